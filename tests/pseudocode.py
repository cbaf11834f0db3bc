"""Evaluates the pseudocode with which AMD's ISA documents define instructions, exactly, for one lane at a time.

``compile_text(text)`` gives a function of an environment: a dict of the names that the text reads (S0, D0, VCC,
laneId, ...) to values, which it updates. Values are bit patterns with a type; floating point is done on fractions and
rounded once, to nearest even, so nothing here depends on the arithmetic that it is to check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple


class Untranslatable(Exception):
    """A text outside the language: prose, or a name nobody defined."""


class Value(NamedTuple):
    """A bit pattern: kind is u (unsigned), i (signed), b (untyped), f or bf (floating point)."""

    kind: str
    width: int
    bits: int

    @property
    def number(self) -> Any:
        """An int; for floating point the Python float, which holds every format up to f64 exactly."""
        if self.kind in FLOATS:
            return decode(self.bits, format_of(self))
        return self.bits - (self.bits >> (self.width - 1) << self.width) if self.kind == "i" else self.bits


class Format(NamedTuple):
    """A binary floating-point format, with infinities unless ``top`` says which finite pattern is the last."""

    exponent: int
    mantissa: int
    bias: int
    top: int | None = None  # the pattern of the largest finite number, where it isn't the one below infinity
    nan: int | None = None  # likewise, where overflow and NaN give one pattern (without a sign, for fnuz)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa


F16, BF16, F32, F64 = Format(5, 10, 15), Format(8, 7, 127), Format(8, 23, 127), Format(11, 52, 1023)
FP8_OCP, BF8_OCP = Format(4, 3, 7, top=0x7E, nan=0x7F), Format(5, 2, 15)
FP8_FNUZ, BF8_FNUZ = Format(4, 3, 8, top=0x7F, nan=0x80), Format(5, 2, 16, top=0x7F, nan=0x80)
FLOATS = {"f": {16: F16, 32: F32, 64: F64}, "bf": {16: BF16}}


def format_of(value: Value) -> Format:
    try:
        return FLOATS[value.kind][value.width]
    except KeyError:
        raise Untranslatable(f"the format {value.kind}{value.width}") from None


def decode(bits: int, fmt: Format) -> float:
    """The number that a pattern of an IEEE format stands for; NaN for every NaN."""
    width = fmt.exponent + fmt.mantissa
    sign, magnitude = -1.0 if bits >> width else 1.0, bits & ((1 << width) - 1)
    if magnitude >= fmt.infinity:
        return math.nan if magnitude > fmt.infinity else sign * math.inf
    field, fraction = magnitude >> fmt.mantissa, magnitude & ((1 << fmt.mantissa) - 1)
    significand = fraction | (1 << fmt.mantissa if field else 0)
    return sign * math.ldexp(significand, max(field, 1) - fmt.bias - fmt.mantissa)


def encode(number: Fraction | float, fmt: Format, negative: bool | None = None) -> int:
    """The pattern nearest to a number, ties to even; ``negative`` gives the sign of a zero."""
    sign = 1 << (fmt.exponent + fmt.mantissa)
    nan = fmt.infinity | (1 << (fmt.mantissa - 1)) if fmt.nan is None else fmt.nan
    if isinstance(number, float):
        if math.isnan(number):
            return nan
        negative = math.copysign(1, number) < 0
        if math.isinf(number):
            return nan if fmt.nan is not None else fmt.infinity | (sign if negative else 0)
        number = Fraction(number)
    if number:
        negative = number < 0
        n, d = abs(number.numerator), number.denominator
        power = n.bit_length() - d.bit_length()
        power = max(power - (n << max(-power, 0) < d << max(power, 0)), 1 - fmt.bias)
        shift = fmt.mantissa - power
        quotient, rest = divmod(n << max(shift, 0), d << max(-shift, 0))
        half = (d << max(-shift, 0)) - 2 * rest
        # Rounding up to the next power of two carries from the mantissa into the exponent, as it should.
        bits = quotient + (half < 0 or (half == 0 and quotient & 1)) + ((power + fmt.bias - 1) << fmt.mantissa)
    else:
        bits = 0
    if bits > (fmt.infinity - 1 if fmt.top is None else fmt.top):
        bits = fmt.infinity if fmt.nan is None else fmt.nan
    if fmt.nan == sign and bits in (0, sign):  # fnuz: no negative zero, and one NaN
        return bits
    return bits | (sign if negative else 0)


# --- Values ---------------------------------------------------------------------------------------------------------


def mask(bits: int, width: int) -> int:
    return bits & ((1 << width) - 1)


def boolean(truth: object) -> Value:
    return Value("u", 1, int(bool(truth)))


def integer(number: int, kind: str = "i", width: int = 32) -> Value:
    return Value(kind, width, mask(number, width))


def floating(number: Fraction | float, like: Value, negative: bool | None = None) -> Value:
    return Value(like.kind, like.width, encode(number, format_of(like), negative))


def is_float(value: Value) -> bool:
    return value.kind in FLOATS


def convert_float(value: Value, kind: str, width: int) -> Value:
    """A floating-point conversion that keeps a NaN's payload and whether it signals."""
    source, target = format_of(value), format_of(Value(kind, width, 0))
    sign = value.bits >> (value.width - 1)
    if not math.isnan(value.number):
        return Value(kind, width, encode(value.number, target))
    payload, shift = mask(value.bits, source.mantissa), target.mantissa - source.mantissa
    payload = payload << shift if shift >= 0 else payload >> -shift or 1 << (target.mantissa - 1)
    return Value(kind, width, sign << (width - 1) | target.infinity | payload)


def view(value: Value, kind: str, width: int) -> Value:
    return Value(kind, width, mask(value.bits, width))


def cast(value: Value, kind: str, width: int) -> Value:
    """32'U(x), 64'F(x), ...: a conversion; except that a float of an integer takes it for its bits."""
    if kind in FLOATS:
        return convert_float(value, kind, width) if is_float(value) else view(value, kind, width)
    if is_float(value):
        raise Untranslatable("a cast of a float to an integer")
    return Value(kind, width, mask(value.number, width))


def fma(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once; sum and product are special cases of it."""
    x, y, z = a.number, b.number, c.number
    if not (math.isfinite(x) and math.isfinite(y)):
        return floating(x * y + z, c)
    if not math.isfinite(z):
        return floating(z, c)
    product_negative = math.copysign(1, x) * math.copysign(1, y) < 0
    negative = product_negative and math.copysign(1, z) < 0 if x == 0 or y == 0 else False
    return floating(Fraction(x) * Fraction(y) + Fraction(z), c, negative)


def negate(a: Value) -> Value:
    return Value(a.kind, a.width, a.bits ^ 1 << (a.width - 1) if is_float(a) else mask(-a.bits, a.width))


def magnitude(a: Value) -> Value:
    return Value(a.kind, a.width, mask(a.bits, a.width - 1)) if is_float(a) else integer(abs(a.number), a.kind, a.width)


def divide(a: Value, b: Value) -> Value:
    x, y = a.number, b.number
    negative = math.copysign(1, x) * math.copysign(1, y) < 0
    if math.isnan(x) or math.isnan(y) or (x == 0 == y) or (math.isinf(x) and math.isinf(y)):
        return floating(math.nan, a)
    if math.isinf(x) or y == 0:
        return floating(-math.inf if negative else math.inf, a)
    return floating(Fraction(0) if math.isinf(y) else Fraction(x) / Fraction(y), a, negative)


def square_root(a: Value) -> Value:
    x = a.number
    if math.isnan(x) or x < 0:
        return floating(math.nan, a)
    return a if x == 0 or math.isinf(x) else floating(exact_root(Fraction(x)), a)


def exact_root(x: Fraction, bits: int = 200) -> Fraction:
    """The square root to so many more bits than any format has that no tie is mistaken."""
    return Fraction(math.isqrt((x.numerator << 2 * bits) // x.denominator), 1 << bits)


def power(a: Value, b: Value) -> Value:
    if not float(b.number).is_integer() or abs(b.number) > 1100:
        raise Untranslatable("a power with a fractional or an excessive exponent")
    return floating(Fraction(a.number) ** int(b.number), a)


class SignedZero(NamedTuple):
    """+0.0 or -0.0 written with its sign: a comparison with it also compares the sign."""

    kind: str
    width: int
    bits: int
    number: float


class Class(NamedTuple):
    """DENORM.f32: a comparison with it asks whether the other side is such a number."""

    format: Format


def is_denormal(a: Value, fmt: Format) -> bool:
    return bool(0 < abs(a.number) < math.ldexp(1, 1 - fmt.bias))


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, Class):
        return is_denormal(a, b.format)
    if isinstance(b, SignedZero):
        return a.number == 0 and math.copysign(1, a.number) == math.copysign(1, b.number)
    x, y = together(a, b)
    return bool(x.number == y.number)


def together(a: Value, b: Value) -> tuple[Value, Value]:
    """Both operands in one type: the wider float, or C's usual conversions of integers."""
    if a.kind == b.kind and a.width == b.width:
        return a, b
    if is_float(a) or is_float(b):
        kind, width = max((v.width, v.kind) for v in (a, b) if is_float(v))[::-1]
        return tuple(  # type: ignore[return-value]
            convert_float(v, kind, width) if is_float(v) else floating(Fraction(v.number), Value(kind, width, 0))
            for v in (a, b)
        )
    width, kind = max(a.width, b.width), "i" if a.kind == b.kind == "i" else "u"
    return integer(a.number, kind, width), integer(b.number, kind, width)


def arithmetic(operator: str, a: Value, b: Value) -> Value:
    if operator in ("<<", ">>"):
        count = b.number
        shifted = a.number << count if operator == "<<" else a.number >> count
        return Value(a.kind, a.width, mask(shifted, a.width))
    if operator == "**":
        return power(a, b)
    a, b = together(a, b)
    if is_float(a):
        one, minus_zero = floating(1.0, a), floating(-0.0, a)
        if operator in ("+", "-"):
            return fma(b, one if operator == "+" else negate(one), a)
        if operator == "*":
            return fma(a, b, minus_zero)
        if operator == "/":
            return divide(a, b)
        raise Untranslatable(f"{operator} of floats")
    x, y = a.number, b.number
    operations: dict[str, Callable[[], int]] = {
        "+": lambda: x + y,
        "-": lambda: x - y,
        "*": lambda: x * y,
        "/": lambda: x // y,
        "%": lambda: x % y,
        "&": lambda: x & y,
        "|": lambda: x | y,
        "^": lambda: x ^ y,
    }
    return integer(operations[operator](), a.kind, a.width)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": equal,
    "!=": lambda a, b: not equal(a, b),
    "<>": lambda a, b: together(a, b)[0].number < together(a, b)[1].number or COMPARISONS[">"](a, b),  # false for NaN
    "<": lambda a, b: together(a, b)[0].number < together(a, b)[1].number,
    "<=": lambda a, b: together(a, b)[0].number <= together(a, b)[1].number,
    ">": lambda a, b: together(a, b)[0].number > together(a, b)[1].number,
    ">=": lambda a, b: together(a, b)[0].number >= together(a, b)[1].number,
}


# --- Functions of the language --------------------------------------------------------------------------------------


def is_nan(a: Value) -> bool:
    return is_float(a) and math.isnan(a.number)


def is_quiet(a: Value) -> bool:
    return is_nan(a) and bool(a.bits >> (format_of(a).mantissa - 1) & 1)


def to_integer(kind: str, width: int) -> Callable[[Value], Value]:
    """A conversion to an integer, towards zero, saturating; NaN gives zero."""
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if kind == "i" else (0, (1 << width) - 1)

    def convert(a: Value) -> Value:
        x = a.number
        if math.isnan(x):
            return integer(0, kind, width)
        return integer(low if x < low else high if x > high else int(x), kind, width)

    return convert


def conversion(name: str) -> Callable[[Value], Value] | None:
    """f32_to_f16, i32_to_f32, f32_to_u32, i16_to_i32, ...: the name says it all."""
    match = re.fullmatch(r"(?:f|bf|i|u)(\d+)_to_(f|bf|i|u)(\d+)", name)
    if match is None:
        return None
    kind, width = match[2], int(match[3])
    if kind in FLOATS:
        return lambda a: (
            quiet(convert_float(a, kind, width)) if is_float(a) else floating(Fraction(a.number), Value(kind, width, 0))
        )
    return to_integer(kind, width) if name[0] in "fb" else lambda a: cast(a, kind, width)


def quiet(a: Value) -> Value:
    return Value(a.kind, a.width, a.bits | 1 << (format_of(a).mantissa - 1)) if is_nan(a) else a


def ldexp(a: Value, exponent: Value) -> Value:
    return a if not math.isfinite(a.number) or a.number == 0 else floating(exact_scale(a, exponent.number), a)


def exact_scale(a: Value, exponent: int) -> Fraction:
    return Fraction(a.number) * Fraction(2) ** max(-400, min(400, exponent))


def rounding(operation: Callable[[Fraction], int]) -> Callable[[Value], Value]:
    return lambda a: (
        floating(Fraction(operation(Fraction(a.number))), a, math.copysign(1, a.number) < 0)
        if math.isfinite(a.number)
        else quiet(a)
    )


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "isNAN": lambda a: boolean(is_nan(a)),
    "isQuietNAN": lambda a: boolean(is_quiet(a)),
    "isSignalNAN": lambda a: boolean(is_nan(a) and not is_quiet(a)),
    "cvtToQuietNAN": quiet,
    "sign": lambda a: boolean(a.bits >> (a.width - 1)),
    "exponent": lambda a: integer(a.bits >> format_of(a).mantissa & (1 << format_of(a).exponent) - 1),
    "abs": magnitude,
    "fma": fma,
    "ldexp": ldexp,
    "sqrt": square_root,
    "pow": power,
    "mantissa": lambda a: floating(Fraction(math.frexp(a.number)[0]), a, a.bits >> (a.width - 1) == 1),
    "signext_from_bit": lambda a, n: (
        cast(view(Value("b", n.number, mask(a.bits, n.number)), "i", n.number), "i", a.width)
        if n.number
        else integer(0, a.kind, a.width)
    ),
    "signext": lambda a: integer(Value("i", a.width, a.bits).number, "i", 64),
    "floor": rounding(math.floor),
    "trunc": rounding(math.trunc),
    "fract": lambda a: arithmetic("-", a, FUNCTIONS["floor"](a)),
    "isEven": lambda a: boolean(math.isfinite(a.number) and a.number % 2 == 0),
    "nop": lambda: boolean(0),
}


def constants() -> dict[str, Any]:
    values: dict[str, Any] = {"INF": Value("f", 64, F64.infinity), "NAN": Value("f", 64, encode(math.nan, F64))}
    for width, fmt in FLOATS["f"].items():
        values[f"INF.f{width}"] = Value("f", width, fmt.infinity)
        values[f"NAN.f{width}"] = Value("f", width, encode(math.nan, fmt))
        values[f"DENORM.f{width}"] = Class(fmt)
        values[f"OVERFLOW_F{width}"] = Value("f", width, fmt.infinity)  # to nearest: infinity, and zero below
        values[f"UNDERFLOW_F{width}"] = Value("f", width, 0)
    for name in ("ROUND_MODE", "ROUND_NEAREST_EVEN", "ROUND_TOWARD_ZERO"):
        values[name] = integer(0)
    values["WAVE_MODE.IEEE"] = boolean(1)  # what compute kernels run with
    return values


CONSTANTS = constants()


# --- Environment ----------------------------------------------------------------------------------------------------

Env = dict[str, Any]


class Bytes:
    """Memory: reads give 32 bytes, of which the text takes what it wants; what isn't there reads as zero."""

    def __init__(self, content: dict[int, int] | None = None):
        self.content = dict(content or {})

    def get(self, address: int) -> Value:
        return Value("b", 256, sum(self.content.get(address + i, 0) << 8 * i for i in range(32)))

    def store(self, address: int, bits: int, low: int, width: int) -> None:
        for i in range(low // 8, (low + width) // 8):
            self.content[address + i] = bits >> 8 * i & 0xFF


class Leave(Exception):
    """break, or return with a value."""

    def __init__(self, value: Value | None = None):
        self.value = value


# --- Parser ---------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""\s+|//[^\n]*
    |(?P<sized>\d+'(?=[A-Za-z0-9]))
    |(?P<number>0x[0-9a-fA-F]+(?:ULL|LL|U)?|\d+\.\d+F?|\d+(?:ULL|LL|U)?)
    |(?P<name>(?:WAVE_MODE|INST)\.\w+|(?:INF|NAN|DENORM)\.f\d+|[A-Za-z_]\w*)
    |(?P<operator>\*\*|<<|>>|<=|>=|==|!=|<>|&&|\|\||\+=|-=|[-+*/%&|^~!<>=?:;,.()\[\]{}])""",
    re.VERBOSE,
)
BINARY = [["||"], ["&&"], ["|"], ["^"], ["&"], ["==", "!=", "<>"], ["<", "<=", ">", ">="], ["<<", ">>"], ["+", "-"]]
BINARY += [["*", "/", "%"], ["**"]]
VIEW = re.compile(r"(u|i|b|f|bf|fp|bfp?)(\d+)")

Expression = Callable[[Env], Any]
Statement = Callable[[Env], None]


class Parser:
    def __init__(self, text: str, functions: dict[str, Callable[..., Value]]):
        self.tokens: list[tuple[str, str]] = []
        self.position = 0
        self.functions = functions
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                raise Untranslatable(f"prose at {text[at : at + 30]!r}")
            if match.lastgroup:
                self.tokens.append((match.lastgroup, match[0]))
            at = match.end()

    def peek(self, *texts: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position][1] in texts

    def accept(self, *texts: str) -> str | None:
        if self.peek(*texts):
            self.position += 1
            return self.tokens[self.position - 1][1]
        return None

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Untranslatable(f"no {text!r} at {' '.join(t for _, t in self.tokens[self.position :][:8])!r}")

    def take(self, kind: str) -> str:
        if self.position >= len(self.tokens) or self.tokens[self.position][0] != kind:
            raise Untranslatable(f"no {kind} at {' '.join(t for _, t in self.tokens[self.position :][:8])!r}")
        self.position += 1
        return self.tokens[self.position - 1][1]

    # Statements

    def block(self, *ends: str) -> Statement:
        statements = []
        while self.position < len(self.tokens) and not self.peek(*ends):
            if not self.accept(";"):
                statements.append(self.statement())

        def run(env: Env) -> None:
            for statement in statements:
                statement(env)

        return run

    def statement(self) -> Statement:
        if self.accept("if"):
            return self.conditional()
        if self.accept("for"):
            return self.loop()
        if self.accept("declare"):
            return self.declaration()
        if self.accept("break"):
            return leave
        if self.accept("return"):
            result = self.expression()

            def give_back(env: Env) -> None:
                raise Leave(result(env))

            return give_back
        if self.peek("nop"):
            self.expression()
            return lambda env: None
        return self.assignment()

    def conditional(self) -> Statement:
        branches: list[tuple[Expression, Statement]] = []
        otherwise: Statement = lambda env: None  # noqa: E731
        while True:
            condition = self.expression()
            self.expect("then")
            branches.append((condition, self.block("elsif", "else", "endif")))
            if not self.accept("elsif"):
                break
        if self.accept("else"):
            otherwise = self.block("endif")
        self.expect("endif")

        def run(env: Env) -> None:
            for condition, body in branches:
                if condition(env).bits:
                    return body(env)
            return otherwise(env)

        return run

    def loop(self) -> Statement:
        name = self.take("name")
        self.expect("in")
        first = self.expression()
        self.expect(":")
        last = self.expression()
        self.expect("do")
        body = self.block("endfor")
        self.expect("endfor")

        def run(env: Env) -> None:
            for i in range(first(env).number, last(env).number + 1):
                env[name] = integer(i)
                try:
                    body(env)
                except Leave as left:
                    if left.value is not None:
                        raise
                    break

        return run

    def declaration(self) -> Statement:
        name = self.take("name")
        self.expect(":")
        width, kind = int(self.take("sized")[:-1]), self.take("name").lower()
        count = None
        if self.accept("["):
            count = int(self.take("number"))
            self.expect("]")

        def run(env: Env) -> None:  # a declared operand keeps its value
            zero = Value(kind, width, 0)
            env[name] = env.get(name, zero) if count is None else dict.fromkeys(range(count), zero)

        return run

    def assignment(self) -> Statement:
        if self.accept("{"):  # { D1.u1, D0.u64 } = ..., the most significant first
            targets = [self.target()]
            while self.accept(","):
                targets.append(self.target())
            self.expect("}")
            self.expect("=")
            source = self.expression()

            def scatter(env: Env) -> None:
                value = source(env)
                for name, accessors in reversed(targets):
                    width = accessors[-1][1][1]
                    assign(env, name, accessors, Value("b", width, mask(value.bits, width)))
                    value = Value("b", value.width - width, value.bits >> width)

            return scatter
        name, accessors = self.target()
        operator = self.accept("+=", "-=")
        if operator is None:
            self.expect("=")
        if self.accept("lambda"):
            return self.function(name)
        start = self.position
        try:  # a = b = ...
            also = self.target()
            chained = self.accept("=") is not None
        except Untranslatable:
            chained = False
        if not chained:
            self.position = start
        source = self.expression()
        if chained:

            def assign_both(env: Env) -> None:
                value = source(env)
                assign(env, *also, value)
                assign(env, name, accessors, value)

            return assign_both
        if operator:
            source = combine(operator[0], reader(name, accessors), source)
        return lambda env: assign(env, name, accessors, source(env))

    def function(self, name: str) -> Statement:
        self.expect("(")
        parameters = [self.take("name")]
        while self.accept(","):
            parameters.append(self.take("name"))
        self.expect(")")
        self.expect("(")
        body = self.block(")")
        self.expect(")")

        def call(*arguments: Value) -> Value:
            try:
                body(dict(zip(parameters, arguments, strict=True)))
            except Leave as left:
                if left.value is not None:
                    return left.value
            raise Untranslatable("a function without a result")

        self.functions = self.functions | {name: call}
        return lambda env: None

    def target(self) -> tuple[str, list[tuple[str, Any]]]:
        return self.take("name"), self.accessors()

    # Expressions

    def accessors(self) -> list[tuple[str, Any]]:
        """What follows a name: .u32, [i], [hi : lo]."""
        found: list[tuple[str, Any]] = []
        while True:
            if self.accept("."):
                name = self.take("name")
                match = VIEW.fullmatch(name)
                if match is None:
                    raise Untranslatable(f"the view .{name}")
                found.append(("view", (match[1], int(match[2]))))
            elif self.accept("["):
                first = self.expression()
                if self.accept(":"):
                    found.append(("slice", (first, self.expression())))
                else:
                    found.append(("index", first))
                self.expect("]")
            else:
                return found

    def expression(self) -> Expression:
        condition = self.binary(0)
        if not self.accept("?"):
            return condition
        yes = self.expression()
        self.expect(":")
        no = self.expression()
        return lambda env: yes(env) if condition(env).bits else no(env)

    def binary(self, level: int) -> Expression:
        if level == len(BINARY):
            return self.unary()
        left = self.binary(level + 1)
        while operator := self.accept(*BINARY[level]):
            left = combine(operator, left, self.binary(level + 1))
        return left

    def unary(self) -> Expression:
        operator = self.accept("-", "+", "~", "!")
        if operator is None:
            return self.postfix()
        if operator in "+-" and self.position < len(self.tokens) and re.fullmatch(r"0\.0F?", self.next_text()):
            width = 32 if self.take("number").endswith("F") else 64
            zero = SignedZero("f", width, (operator == "-") << (width - 1), -0.0 if operator == "-" else 0.0)
            return lambda env: zero
        operand = self.unary()
        if operator == "-":
            return lambda env: negate(operand(env))
        if operator == "~":
            return lambda env: invert(operand(env))
        return operand if operator == "+" else lambda env: boolean(not operand(env).bits)

    def next_text(self) -> str:
        return self.tokens[self.position][1]

    def postfix(self) -> Expression:
        if self.accept("("):
            inner = self.expression()
            self.expect(")")
        elif self.accept("{"):
            parts = [self.expression()]
            while self.accept(","):
                parts.append(self.expression())
            self.expect("}")
            inner = lambda env: concatenate(part(env) for part in parts)  # noqa: E731
        elif self.position < len(self.tokens) and self.tokens[self.position][0] == "sized":
            inner = self.sized(int(self.take("sized")[:-1]))
        elif self.position < len(self.tokens) and self.tokens[self.position][0] == "number":
            constant = number(self.take("number"))
            inner = lambda env: constant  # noqa: E731
        else:
            name = self.take("name")
            if self.accept("("):
                return self.call(name)
            return reader(name, self.accessors())
        accessors = self.accessors()
        return lambda env: access(inner(env), accessors, env)

    def sized(self, width: int) -> Expression:
        if self.tokens[self.position][0] == "number":
            text = self.take("number")
            constant = number(text, width) if "." in text else Value("u", width, mask(number(text).bits, width))
            return lambda env: constant
        kind = self.take("name").lower()
        self.expect("(")
        inner = self.expression()
        self.expect(")")
        return lambda env: cast(inner(env), kind, width)

    def call(self, name: str) -> Expression:
        arguments = []
        while not self.accept(")"):
            arguments.append(self.expression())
            self.accept(",")
        function = self.functions.get(name) or FUNCTIONS.get(name) or conversion(name)
        if function is None:
            raise Untranslatable(f"the function {name}")
        accessors = self.accessors()
        return lambda env: access(function(*(a(env) for a in arguments)), accessors, env)


def leave(env: Env) -> None:
    raise Leave


def number(text: str, width: int = 0) -> Value:
    if "." in text:
        width = width or (32 if text.endswith("F") else 64)
        return Value("f", width, encode(Fraction(text.rstrip("F")), FLOATS["f"][width]))
    value = int(text.rstrip("UL"), 16 if text.startswith("0x") else 10)
    return integer(value, "u" if "U" in text else "i", 64 if "LL" in text or value >> 32 else 32)


def invert(a: Value) -> Value:
    return Value(a.kind, a.width, a.bits ^ ((1 << a.width) - 1))


def concatenate(parts: Iterable[Value]) -> Value:
    bits = width = 0
    for part in parts:
        bits, width = bits << part.width | part.bits, width + part.width
    return Value("b", width, bits)


def combine(operator: str, left: Expression, right: Expression) -> Expression:
    if operator == "&&":
        return lambda env: boolean(left(env).bits and right(env).bits)
    if operator == "||":
        return lambda env: boolean(left(env).bits or right(env).bits)
    if operator in COMPARISONS:
        compare = COMPARISONS[operator]
        return lambda env: boolean(compare(left(env), right(env)))
    return lambda env: arithmetic(operator, left(env), right(env))


def reader(name: str, accessors: list[tuple[str, Any]]) -> Expression:
    def read(env: Env) -> Any:
        value = env[name] if name in env else CONSTANTS.get(name)
        if value is None:
            raise Untranslatable(f"the name {name}")
        return access(value, accessors, env)

    return read


def access(value: Any, accessors: list[tuple[str, Any]], env: Env) -> Any:
    for kind, argument in accessors:
        if kind == "view":
            value = view(value, *argument)
        elif kind == "index":
            i = argument(env).number
            value = boolean(value.bits >> i & 1) if isinstance(value, Value) else value.get(i)
        else:
            high, low = (bound(env).number for bound in argument)
            if high < low:  # [0 : 31]: the bits in the other order
                width = low - high + 1
                value = Value("b", width, sum((value.bits >> high + i & 1) << width - 1 - i for i in range(width)))
            else:
                value = Value("b", high - low + 1, mask(value.bits >> low, high - low + 1))
    return value


def assign(env: Env, name: str, accessors: list[tuple[str, Any]], value: Value) -> None:
    """Writes into the window of bits that the accessors name; a bare name takes the value with its type."""
    container: Any = env
    key: Any = name
    accessors = list(accessors)
    while accessors and accessors[0][0] == "index" and isinstance(container.get(key), dict | Bytes):
        container = container[key]
        key = accessors.pop(0)[1](env).number
    if not accessors:
        container[key] = value
        return
    low, width, kind = 0, 0, "b"
    for what, argument in accessors:
        if what == "view":
            kind, width = argument
        elif what == "index":
            low, width = low + argument(env).number, 1
        else:
            high, start = (bound(env).number for bound in argument)
            low, width = low + start, high - start + 1
    if kind in FLOATS and is_float(value) and width != value.width:
        value = convert_float(value, kind, width)
    bits = mask(value.bits, width) << low
    if isinstance(container, Bytes):
        container.store(key, bits, low, width)
        return
    old = container.get(key)
    if old is None:
        old = Value("b", 0, 0)
    total = max(old.width, low + width)
    kept = old.bits & ~(((1 << width) - 1) << low)
    container[key] = Value(kind if width == total else old.kind, total, kept | bits)


# --- Interface ------------------------------------------------------------------------------------------------------


def compile_text(text: str, functions: dict[str, Callable[..., Value]] | None = None) -> Callable[[Env], Env]:
    """A function that runs the text on an environment, changing and returning it; Untranslatable if it can't be."""
    parser = Parser(text, functions or {})
    body = parser.block()

    def run(env: Env) -> Env:
        body(env)
        return env

    return run

"""What can go wrong in a kernel, or in this model of the machine."""


class UnknownInstruction(Exception):
    """An instruction, modifier, operand or descriptor setting that is not modelled: never skipped."""


class MemoryFault(Exception):
    """An access outside the memory that was handed over, to memory that may only be read, or misaligned.

    Attributes:
        kind, address, size: of the access.
        index: of the address among those that were passed.
        why: what is wrong with it.
        where: kernel, instruction, block, wave and lane, once known.
    """

    def __init__(self, kind: str, address: int, size: int, index: int, why: str):
        super().__init__(kind, address, size, index, why)
        self.kind, self.address, self.size, self.index, self.why = kind, address, size, index, why
        self.where = ""

    def __str__(self) -> str:
        return f"{self.where}{self.kind} of {self.size} bytes at {self.address:#x}: {self.why}"

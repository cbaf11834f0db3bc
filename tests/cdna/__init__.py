"""Executes AMD CDNA machine code, of gfx942 and gfx950, on the CPU: byte for byte, vectorised over lanes with numpy.

- code_object: takes an ELF file apart into kernels and instructions, which llvm-objdump spells out.
- machine: runs a kernel on a grid. Waves at the same instruction run in step, as one :class:`state.State`.
- operands: resolves operands, once, to functions that read or write registers.
- scalar, vector, crosslane, flat: tables of instructions; alu, convert: what they compute.
- memory: true addresses of this process. An access outside the ranges handed over is a fault, as under a sanitizer.

What is not modelled raises :class:`errors.UnknownInstruction`. What the hardware leaves open is random, so that code
which relies on it shows: registers and LDS that nothing was written to, the last bit of approximate functions, which
NaN a conversion to fp8 makes; so is which wave of a block that shares LDS goes first from one barrier to the next. Time
is not modelled: waits have no effect, and a load is complete when the next instruction starts.
"""

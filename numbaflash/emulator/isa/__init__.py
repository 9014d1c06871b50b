"""The instruction set: one module per chapter of the PTX ISA manual, each a table of opcode -> translation."""

from . import control, convert, data, floating, integer, memory, tensor, warp  # noqa: F401  they fill the table
from .emit import Code, Names, Site, translate

__all__ = ["Code", "Names", "Site", "translate"]

"""Declarations of variables and parameters (PTX ISA, "Variables")."""

from __future__ import annotations

from .ir import SIZES, Float, Symbol, Variable
from .tokens import Tokens


def variables(tokens: Tokens, external: bool) -> list[Variable]:
    """``.space [.align n] .type name[n] = {...}, name2 ...;``."""
    space = tokens.next().text[1:]
    align = None
    token = tokens.next()
    while token.text == ".align" or token.text.startswith((".ptr", ".attribute")):
        if token.text != ".align":
            tokens.fail(f"unknown attribute {token.text!r}", token, "unsupported")
        align = _alignment(tokens)
        token = tokens.next()
    vector = 1
    if token.text in (".v2", ".v4"):
        vector = int(token.text[2:])
        token = tokens.next()
    kind = token.text[1:]
    if kind not in SIZES or kind == "pred":
        tokens.fail(f"unknown type {token.text!r}", token, "unsupported")
    found = []
    while True:
        name = tokens.name()
        count = vector
        while tokens.accept("["):
            count *= 0 if tokens.peek() == "]" else tokens.integer()
            tokens.expect("]")
        initial = _initial(tokens) if tokens.accept("=") else ()
        if initial and not count:
            count = len(initial)
        size = count * SIZES[kind]
        found.append(Variable(name, space, kind, align or SIZES[kind] * vector, size, external, initial))
        if not tokens.accept(","):
            break
    tokens.expect(";")
    return found


def parameters(tokens: Tokens) -> list[Variable]:
    """``(.param .type name, .reg .type name2 ...)``."""
    tokens.expect("(")
    found: list[Variable] = []
    while not tokens.accept(")"):
        token = tokens.next()
        if token.text == ".reg":
            kind = register_type(tokens)
            found.append(Variable(tokens.name(), "reg", kind, SIZES[kind], SIZES[kind]))
        elif token.text == ".param":
            found.append(_parameter(tokens))
        else:
            tokens.fail(f"unknown parameter space {token.text!r}", token)
        tokens.accept(",")
    return found


def register_type(tokens: Tokens) -> str:
    """The type of a register or parameter."""
    token = tokens.next()
    kind = token.text[1:]
    if kind not in SIZES:
        tokens.fail(f"unknown type {token.text!r}", token, "unsupported")
    return kind


def _parameter(tokens: Tokens) -> Variable:
    align = _alignment(tokens) if tokens.accept(".align") else None
    kind = register_type(tokens)
    while tokens.accept(".ptr") or tokens.peek() in (".global", ".const", ".shared", ".local"):
        if tokens.peek() != ".align" and tokens.peek().startswith("."):
            tokens.next()
        if tokens.accept(".align"):
            tokens.integer()
    name = tokens.name()
    size = SIZES[kind]
    if tokens.accept("["):
        size *= tokens.integer()
        tokens.expect("]")
    return Variable(name, "param", kind, align or SIZES[kind], size)


def _alignment(tokens: Tokens) -> int:
    token = tokens.ahead()
    align = tokens.integer()
    if align < 1 or align & (align - 1) or align > 4096:
        tokens.fail(f"alignment {align}; a power of two up to 4096 is accepted", token)
    return align


def _initial(tokens: Tokens) -> tuple[int | Float | Symbol, ...]:
    if not tokens.accept("{"):
        return (_initial_value(tokens),)
    values: list[int | Float | Symbol] = []
    while not tokens.accept("}"):
        values.extend(_initial(tokens))
        tokens.accept(",")
    return tuple(values)


def _initial_value(tokens: Tokens) -> int | Float | Symbol:
    token = tokens.ahead()
    if token.kind == "float":
        return tokens.float_literal()
    if token.kind != "name":
        return tokens.integer()
    name = tokens.name()
    if name == "generic":
        tokens.expect("(")
        name = tokens.name()
        tokens.expect(")")
    return Symbol(name, tokens.integer() if tokens.accept("+") else 0)

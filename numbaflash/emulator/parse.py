"""PTX text -> typed IR: modules, functions, variables and instructions, each with the line that it came from.

Only syntax is known here; what an instruction means, and whether it is implemented, is for the tables in ``isa``.
Grammar: PTX ISA 9.x, "Syntax" and "Directives".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from .errors import EmulatorError, Place
from .ir import (
    SIZES,
    Address,
    Float,
    Function,
    Instruction,
    Int,
    Label,
    Module,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Tuple,
    Variable,
    Vector,
)

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"\n]*")
      | (?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)
      | (?P<int>(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?)
      | (?P<name>[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*)
      | (?P<dot>\.[A-Za-z_]\w*(?:::\w+)?)
      | (?P<sign>[{}()\[\],;:@!<>|=+\-~*&])""",
    re.VERBOSE | re.DOTALL,
)
_TARGET = re.compile(r"sm_(\d+)([af]?)$")
_MOST_REGISTERS = 1 << 20
_IGNORED_LINKAGE = {".visible", ".weak", ".common"}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str) -> Module:
    """Parses a PTX module.

    Raises:
        EmulatorError: The text is cut off, malformed, for a target that is not emulated, or has an unknown directive.
    """
    return _Parser(text).module()


class _Parser:
    """Recursive descent over the tokens; scopes (``{ .reg ...; }``) are resolved by renaming."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._tokens(text))
        self.at = 0
        self.result = Module(text)
        self.loc: tuple[int, int] | None = None
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0

    def _tokens(self, text: str) -> Iterator[_Token]:
        position, line = 0, 1
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise EmulatorError(f"unexpected character {text[position]!r}", kind="syntax", place=Place(line=line))
            if match.lastgroup != "space":
                yield _Token(match.lastgroup or "", match.group(), line)
            line += match.group().count("\n")
            position = match.end()

    # ---- token access

    def fail(self, reason: str, token: _Token | None = None, kind: str = "syntax") -> NoReturn:
        token = token or (self.tokens[self.at] if self.at < len(self.tokens) else None)
        line = token.line if token else self.text.count("\n") + 1
        raise EmulatorError(reason, kind=kind, place=Place(line=line))

    def peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def ahead(self) -> _Token:
        """The next token, not taken yet."""
        if self.at >= len(self.tokens):
            self.fail("the PTX text ends in the middle of a statement")
        return self.tokens[self.at]

    def next(self) -> _Token:
        token = self.ahead()
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        token = self.next()
        if token.text != text:
            self.fail(f"expected {text!r}, found {token.text!r}", token)

    def name(self) -> str:
        token = self.next()
        if token.kind != "name":
            self.fail(f"expected a name, found {token.text!r}", token)
        return token.text

    def integer(self) -> int:
        negative = self.accept("-")
        inverted = not negative and self.accept("~")
        token = self.next()
        if token.kind != "int":
            self.fail(f"expected an integer, found {token.text!r}", token)
        digits = token.text.rstrip("U").lower()
        octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xb"
        if octal and set(digits) - set("01234567"):
            self.fail(f"{token.text} is no octal number", token)
        value = int(digits, 8 if octal else 0)
        return -value if negative else ~value if inverted else value

    # ---- module scope

    def module(self) -> Module:
        external = False
        while self.at < len(self.tokens):
            token = self.next()
            match token.text:
                case ".version":
                    self.next()
                case ".target":
                    self._target()
                case ".address_size":
                    if self.integer() != 64:
                        self.fail("only 64-bit addresses are emulated", token, "unsupported")
                case ".file":
                    self._file()
                case ".extern":
                    external = True
                    continue
                case ".global" | ".const" | ".shared":
                    self.at -= 1
                    for variable in self._variables(external):
                        self.result.variables[variable.name] = variable
                case ".entry" | ".func":
                    self._function(entry=token.text == ".entry", line=token.line)
                case ".section":
                    while not self.accept("{"):
                        self.next()
                    while not self.accept("}"):
                        self.next()
                case linkage if linkage in _IGNORED_LINKAGE:
                    continue
                case _:
                    self.fail(f"unknown directive {token.text!r}", token, "unsupported")
            external = False
        if not self.result.target:
            raise EmulatorError("not a PTX module: it has no .target directive", kind="syntax")
        return self.result

    def _target(self) -> None:
        token = self.next()
        match = _TARGET.match(token.text)
        if match is None or int(match[1]) < 70 or int(match[1]) >= 100:
            self.fail(f"target {token.text!r}; sm_70 to sm_90a are emulated", token, "unsupported")
        self.result.target = token.text
        while self.accept(","):
            self.next()

    def _file(self) -> None:
        number = self.integer()
        line = self.ahead().line
        self.result.files[number] = self.next().text.strip('"')
        self._rest_of_line(line)

    def _rest_of_line(self, line: int) -> None:
        while self.at < len(self.tokens) and self.tokens[self.at].line == line:
            self.at += 1

    def _variables(self, external: bool) -> list[Variable]:
        """``.space [.align n] .type name[n] = {...}, name2 ...;``."""
        space = self.next().text[1:]
        align = None
        token = self.next()
        while token.text == ".align" or token.text.startswith((".ptr", ".attribute")):
            if token.text != ".align":
                self.fail(f"unknown attribute {token.text!r}", token, "unsupported")
            align = self._alignment()
            token = self.next()
        vector = 1
        if token.text in (".v2", ".v4"):
            vector = int(token.text[2:])
            token = self.next()
        kind = token.text[1:]
        if kind not in SIZES or kind == "pred":
            self.fail(f"unknown type {token.text!r}", token, "unsupported")
        found = []
        while True:
            name = self.name()
            count = vector
            while self.accept("["):
                count *= 0 if self.peek() == "]" else self.integer()
                self.expect("]")
            initial = self._initial() if self.accept("=") else ()
            if initial and not count:
                count = len(initial)
            size = count * SIZES[kind]
            found.append(Variable(name, space, kind, align or SIZES[kind] * vector, size, external, initial))
            if not self.accept(","):
                break
        self.expect(";")
        return found

    def _alignment(self) -> int:
        align = self.integer()
        if align < 1 or align & (align - 1) or align > 4096:
            self.fail(f"alignment {align}; a power of two up to 4096 is accepted", self.tokens[self.at - 1])
        return align

    def _initial(self) -> tuple[int | Float | Symbol, ...]:
        if not self.accept("{"):
            return (self._initial_value(),)
        values: list[int | Float | Symbol] = []
        while not self.accept("}"):
            if self.peek() == "{":
                values.extend(self._initial())
            else:
                values.append(self._initial_value())
            self.accept(",")
        return tuple(values)

    def _initial_value(self) -> int | Float | Symbol:
        token = self.ahead()
        if token.kind == "float":
            self.at += 1
            return _float(token.text)
        if token.kind == "name":
            self.at += 1
            if token.text == "generic":
                self.expect("(")
                name = self.name()
                self.expect(")")
            else:
                name = token.text
            return Symbol(name, self.integer() if self.accept("+") else 0)
        return self.integer()

    # ---- functions

    def _function(self, entry: bool, line: int) -> None:
        returns = [] if entry or self.peek() != "(" else self._params()
        name = self.name()
        function = Function(name, entry, line, self._params() if self.peek() == "(" else [], returns)
        self.result.functions[name] = function
        while self.peek().startswith("."):
            token = self.next()
            match token.text:
                case ".maxntid" | ".reqntid":
                    function.max_threads = self.integer()
                    while self.accept(","):
                        function.max_threads *= self.integer()
                case ".minnctapersm" | ".maxnreg":
                    self.integer()
                case ".noreturn":
                    pass
                case ".pragma":
                    self.next()
                    self.expect(";")
                case _:
                    self.fail(f"unknown directive {token.text!r}", token, "unsupported")
        if self.accept(";"):
            return
        self.expect("{")
        function.defined = True
        self.loc = None
        self.scopes = [{}]
        self._body(function)

    def _params(self) -> list[Variable]:
        self.expect("(")
        found: list[Variable] = []
        while not self.accept(")"):
            token = self.next()
            if token.text == ".reg":
                kind = self.next().text[1:]
                if kind not in SIZES:
                    self.fail(f"unknown type .{kind}", kind="unsupported")
                found.append(Variable(self.name(), "reg", kind, SIZES[kind], SIZES[kind]))
            elif token.text == ".param":
                found.append(self._param())
            else:
                self.fail(f"unknown parameter space {token.text!r}", token)
            self.accept(",")
        return found

    def _param(self) -> Variable:
        align = self._alignment() if self.accept(".align") else None
        token = self.next()
        kind = token.text[1:]
        if kind not in SIZES:
            self.fail(f"unknown type {token.text!r}", token, "unsupported")
        while self.accept(".ptr") or self.peek() in (".global", ".const", ".shared", ".local"):
            if self.peek() != ".align" and self.peek().startswith("."):
                self.next()
            if self.accept(".align"):
                self.integer()
        name = self.name()
        size = SIZES[kind]
        if self.accept("["):
            size *= self.integer()
            self.expect("]")
        return Variable(name, "param", kind, align or SIZES[kind], size)

    def _declare(self, name: str) -> str:
        """The unique name of something declared in the innermost scope."""
        unique = name if len(self.scopes) == 1 else f"{name}@{self.scope_count}"
        self.scopes[-1][name] = unique
        return unique

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _body(self, function: Function) -> None:
        while True:
            token = self.next()
            text = token.text
            if text == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            elif text == "{":
                self.scope_count += 1
                self.scopes.append({})
                self._declare_labels()
            elif token.kind == "dot":
                self._body_directive(function, token)
            elif token.kind == "name" and self.peek() == ":":
                self.at += 1
                function.body.append(Label(self._resolve(text)))
                if self.peek() == ".branchtargets":
                    self.at += 1
                    function.body.pop()
                    function.tables[self._resolve(text)] = self._names_until_semicolon()
                elif self.peek() == ".callprototype":
                    self.fail("indirect calls are not emulated", token, "unsupported")
            else:
                self.at -= 1
                function.body.append(self._instruction(function))

    def _declare_labels(self) -> None:
        """Labels may be used before they stand, so a scope's labels are declared when it opens."""
        depth, at = 0, self.at
        while at + 1 < len(self.tokens) and depth >= 0:
            text = self.tokens[at].text
            depth += (text == "{") - (text == "}")
            starts = self.tokens[at - 1].text in (";", "{", "}", ":")
            if depth == 0 and starts and self.tokens[at].kind == "name" and self.tokens[at + 1].text == ":":
                self._declare(text)
            at += 1

    def _names_until_semicolon(self) -> list[str]:
        names = [self._resolve(self.name())]
        while self.accept(","):
            names.append(self._resolve(self.name()))
        self.expect(";")
        return names

    def _body_directive(self, function: Function, token: _Token) -> None:
        match token.text:
            case ".reg":
                kind_token = self.next()
                kind = kind_token.text[1:]
                if kind not in SIZES:
                    self.fail(f"unknown type {kind_token.text!r}", kind_token, "unsupported")
                while True:
                    name = self.name()
                    if self.accept("<"):
                        count = self.integer()
                        if count > _MOST_REGISTERS:
                            self.fail(f"{count} registers of one name", token)
                        for number in range(count):
                            function.registers[self._declare(f"{name}{number}")] = kind
                        self.expect(">")
                    else:
                        function.registers[self._declare(name)] = kind
                    if not self.accept(","):
                        break
                self.expect(";")
            case ".local" | ".shared" | ".param" | ".const" | ".global":
                self.at -= 1
                for variable in self._variables(external=False):
                    unique = self._declare(variable.name)
                    function.variables[unique] = Variable(
                        unique, variable.space, variable.type, variable.align, variable.size, False, variable.initial
                    )
            case ".loc":
                line = token.line
                file_number, source_line = self.integer(), self.integer()
                self.loc = (file_number, source_line)
                self._rest_of_line(line)
            case ".pragma":
                self.next()
                self.expect(";")
            case _:
                self.fail(f"unknown directive {token.text!r}", token, "unsupported")

    def _instruction(self, function: Function) -> Instruction:
        guard: Reg | Not | None = None
        line = self.ahead().line
        if self.accept("@"):
            negated = self.accept("!")
            reg = self._register(self.name(), function)
            guard = Not(reg) if negated else reg
        token = self.next()
        if token.kind != "name":
            self.fail(f"expected an instruction, found {token.text!r}", token)
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self._operand(function))
            if self.peek() != ";":
                self.expect(",")
        return Instruction(token.text, tuple(operands), guard, line, self.loc)

    def _register(self, name: str, function: Function) -> Reg:
        unique = self._resolve(name)
        if unique not in function.registers:
            self.fail(f"register {name} is not declared", self.tokens[self.at - 1])
        return Reg(unique)

    def _operand(self, function: Function) -> Operand:
        token = self.next()
        match token.text:
            case "[":
                return self._address(function)
            case "{" | "(":
                close = "}" if token.text == "{" else ")"
                items = []
                while not self.accept(close):
                    items.append(self._operand(function))
                    self.accept(",")
                return Vector(tuple(items)) if close == "}" else Tuple(tuple(items))
            case "!":
                return Not(self._register(self.name(), function))
            case "-" | "~":
                if self.ahead().kind == "float":
                    literal = _float(self.next().text)
                    return Float(literal.bits ^ (1 << (literal.size * 8 - 1)), literal.size)
                self.at -= 1
                return Int(self.integer())
        if token.kind == "float":
            return _float(token.text)
        if token.kind == "int":
            self.at -= 1
            return Int(self.integer())
        if token.kind != "name":
            self.fail(f"unexpected {token.text!r} in an operand", token)
        unique = self._resolve(token.text)
        if unique in function.registers or token.text.startswith("%") or token.text == "_":
            first = Reg(unique)
            if self.accept("|"):
                return Pair(first, Reg(self._resolve(self.name())))
            return first
        offset = self.integer() if self.accept("+") else 0
        return Symbol(unique, offset)

    def _address(self, function: Function) -> Address:
        base: Reg | Symbol | None = None
        if self.ahead().kind == "name":
            name = self._resolve(self.name())
            if name in function.registers:
                base = Reg(name)
            elif name.startswith("%"):
                self.fail(f"register {name} is not declared", self.tokens[self.at - 1])
            else:
                base = Symbol(name)
            offset = self.integer() if self.accept("+") else -self.integer() if self.accept("-") else 0
        else:
            offset = self.integer()
        self.expect("]")
        return Address(base, offset)


def _float(text: str) -> Float:
    if text[:2] in ("0f", "0F"):
        return Float(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D"):
        return Float(int(text[2:], 16), 8)
    return Float(int.from_bytes(struct.pack("<d", float(text)), "little"), 8)

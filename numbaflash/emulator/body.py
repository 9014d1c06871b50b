"""The body of a function: scopes, labels, instructions and their operands (PTX ISA, "Statements")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .declarations import register_type, variables
from .ir import Address, Float, Function, Instruction, Int, Label, Not, Operand, Pair, Reg, Symbol, Tuple, Vector
from .tokens import Token, Tokens

_MOST_REGISTERS = 1 << 20


@dataclass(frozen=True)
class _Scope:
    """``{ .reg ...; }``: what is declared in it, and the suffix that makes those names unique in the function."""

    suffix: str
    names: dict[str, str] = field(default_factory=dict)


class Body:
    """Fills a function with what stands behind its ``{``; scopes are resolved by renaming."""

    def __init__(self, tokens: Tokens, function: Function) -> None:
        self.tokens = tokens
        self.function = function
        self.scopes = [_Scope("")]
        self.loc: tuple[int, int] | None = None

    def _declare(self, name: str) -> str:
        """The unique name of something declared in the innermost scope."""
        scope = self.scopes[-1]
        scope.names[name] = name + scope.suffix
        return name + scope.suffix

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return name

    # ---- statements

    def parse(self) -> None:
        """Takes everything up to the ``}`` that ends the function."""
        tokens, body = self.tokens, self.function.body
        while True:
            token = tokens.next()
            text = token.text
            if text == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            elif text == "{":
                self.scopes.append(_Scope(f"@{tokens.at}"))
                self._declare_labels()
            elif token.kind == "dot":
                self._directive(token)
            elif token.kind == "name" and tokens.accept(":"):
                if tokens.accept(".branchtargets"):
                    self.function.tables[self._resolve(text)] = self._names_until_semicolon()
                elif tokens.peek() == ".callprototype":
                    tokens.fail("indirect calls are not emulated", token, "unsupported")
                else:
                    body.append(Label(self._resolve(text)))
            else:
                tokens.at -= 1
                body.append(self._instruction())

    def _declare_labels(self) -> None:
        """Labels may be used before they stand, so a scope's labels are declared when it opens."""
        items, at, depth = self.tokens.items, self.tokens.at, 0
        while at + 1 < len(items) and depth >= 0:
            text = items[at].text
            depth += (text == "{") - (text == "}")
            starts = items[at - 1].text in (";", "{", "}", ":")
            if depth == 0 and starts and items[at].kind == "name" and items[at + 1].text == ":":
                self._declare(text)
            at += 1

    def _names_until_semicolon(self) -> list[str]:
        names = [self._resolve(self.tokens.name())]
        while self.tokens.accept(","):
            names.append(self._resolve(self.tokens.name()))
        self.tokens.expect(";")
        return names

    def _directive(self, token: Token) -> None:
        tokens = self.tokens
        match token.text:
            case ".reg":
                self._registers()
            case ".local" | ".shared" | ".param" | ".const" | ".global":
                tokens.at -= 1
                for variable in variables(tokens, external=False):
                    unique = self._declare(variable.name)
                    self.function.variables[unique] = replace(variable, name=unique)
            case ".loc":
                self.loc = tokens.integer(), tokens.integer()
                tokens.skip_line(token.line)
            case ".pragma":
                tokens.next()
                tokens.expect(";")
            case _:
                tokens.fail(f"unknown directive {token.text!r}", token, "unsupported")

    def _registers(self) -> None:
        """``.reg .type name, name<count>, ...;``."""
        tokens, registers = self.tokens, self.function.registers
        kind = register_type(tokens)
        while True:
            token = tokens.ahead()
            name = tokens.name()
            if tokens.accept("<"):
                count = tokens.integer()
                if count > _MOST_REGISTERS:
                    tokens.fail(f"{count} registers of one name", token)
                for number in range(count):
                    registers[self._declare(f"{name}{number}")] = kind
                tokens.expect(">")
            else:
                registers[self._declare(name)] = kind
            if not tokens.accept(","):
                break
        tokens.expect(";")

    # ---- instructions

    def _instruction(self) -> Instruction:
        tokens = self.tokens
        guard: Reg | Not | None = None
        line = tokens.ahead().line
        if tokens.accept("@"):
            negated = tokens.accept("!")
            guard = Not(self._register()) if negated else self._register()
        token = tokens.next()
        if token.kind != "name":
            tokens.fail(f"expected an instruction, found {token.text!r}", token)
        operands: list[Operand] = []
        while not tokens.accept(";"):
            operands.append(self._operand())
            if tokens.peek() != ";":
                tokens.expect(",")
        return Instruction(token.text, tuple(operands), guard, line, self.loc)

    def _register(self) -> Reg:
        token = self.tokens.ahead()
        unique = self._resolve(self.tokens.name())
        if unique not in self.function.registers:
            self.tokens.fail(f"register {token.text} is not declared", token)
        return Reg(unique)

    def _operand(self) -> Operand:
        tokens = self.tokens
        token = tokens.ahead()
        if token.kind == "float":
            return tokens.float_literal()
        if token.kind == "int":
            return Int(tokens.integer())
        if token.kind == "name":
            return self._name_operand()
        match token.text:
            case "[":
                return self._address()
            case "{":
                return Vector(self._list("}"))
            case "(":
                return Tuple(self._list(")"))
            case "!":
                tokens.next()
                return Not(self._register())
        if token.text not in ("-", "~"):
            tokens.fail(f"unexpected {token.text!r} in an operand", token)
        return self._signed()

    def _name_operand(self) -> Operand:
        """A register, a pair of them, or the address of a variable, a function or a label."""
        tokens = self.tokens
        name = tokens.name()
        unique = self._resolve(name)
        if unique in self.function.registers or name.startswith("%") or name == "_":
            first = Reg(unique)
            return Pair(first, Reg(self._resolve(tokens.name()))) if tokens.accept("|") else first
        return Symbol(unique, tokens.integer() if tokens.accept("+") else 0)

    def _list(self, close: str) -> tuple[Operand, ...]:
        self.tokens.next()
        items = []
        while not self.tokens.accept(close):
            items.append(self._operand())
            self.tokens.accept(",")
        return tuple(items)

    def _signed(self) -> Int | Float:
        tokens = self.tokens
        sign = tokens.next()
        if tokens.ahead().kind != "float":
            tokens.at -= 1
            return Int(tokens.integer())
        if sign.text == "~":
            tokens.fail("~ in front of a float", sign)
        literal = tokens.float_literal()
        return Float(literal.bits ^ (1 << (literal.size * 8 - 1)), literal.size)

    def _address(self) -> Address:
        tokens = self.tokens
        tokens.next()
        base: Reg | Symbol | None = None
        token = tokens.ahead()
        if token.kind == "name":
            name = self._resolve(tokens.name())
            if name in self.function.registers:
                base = Reg(name)
            elif name.startswith("%"):
                tokens.fail(f"register {name} is not declared", token)
            else:
                base = Symbol(name)
            offset = tokens.integer() if tokens.accept("+") else -tokens.integer() if tokens.accept("-") else 0
        else:
            offset = tokens.integer()
        tokens.expect("]")
        return Address(base, offset)

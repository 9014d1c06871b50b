"""PTX text -> typed IR: modules, functions, variables and instructions, each with the line that it came from.

Only syntax is known here, and in what is used here (`body`, `declarations`, `tokens`); what an instruction means, and
whether it is implemented, is for the tables in ``isa``. Grammar: PTX ISA 9.x, "Syntax" and "Directives".
"""

from __future__ import annotations

import re

from .body import Body
from .declarations import parameters, variables
from .errors import EmulatorError
from .ir import Function, Module
from .tokens import Tokens

_TARGET = re.compile(r"sm_(\d+)([af]?)$")
_IGNORED_LINKAGE = {".visible", ".weak", ".common"}


def parse(text: str) -> Module:
    """Parses a PTX module.

    Raises:
        EmulatorError: The text is cut off, malformed, for a target that is not emulated, or has an unknown directive.
    """
    tokens, module = Tokens(text), Module(text)
    external = False
    while tokens.at < len(tokens.items):
        token = tokens.next()
        match token.text:
            case ".version":
                tokens.next()
            case ".target":
                module.target = _target(tokens)
            case ".address_size":
                if tokens.integer() != 64:
                    tokens.fail("only 64-bit addresses are emulated", token, "unsupported")
            case ".file":
                number = tokens.integer()
                line = tokens.ahead().line
                module.files[number] = tokens.next().text.strip('"')
                tokens.skip_line(line)
            case ".extern":
                external = True
                continue
            case ".global" | ".const" | ".shared":
                tokens.at -= 1
                module.variables.update({variable.name: variable for variable in variables(tokens, external)})
            case ".entry" | ".func":
                function = _function(tokens, token.text == ".entry", token.line)
                module.functions[function.name] = function
            case ".section":
                while not tokens.accept("{"):
                    tokens.next()
                while not tokens.accept("}"):
                    tokens.next()
            case linkage if linkage in _IGNORED_LINKAGE:
                continue
            case _:
                tokens.fail(f"unknown directive {token.text!r}", token, "unsupported")
        external = False
    if not module.target:
        raise EmulatorError("not a PTX module: it has no .target directive", kind="syntax")
    return module


def _target(tokens: Tokens) -> str:
    token = tokens.next()
    match = _TARGET.match(token.text)
    if match is None or int(match[1]) < 70 or int(match[1]) >= 100:
        tokens.fail(f"target {token.text!r}; sm_70 to sm_90a are emulated", token, "unsupported")
    while tokens.accept(","):
        tokens.next()
    return token.text


def _function(tokens: Tokens, entry: bool, line: int) -> Function:
    """``.entry name (parameters) directives { body }``, or a declaration that ends with ``;``."""
    returns = [] if entry or tokens.peek() != "(" else parameters(tokens)
    name = tokens.name()
    function = Function(name, entry, line, parameters(tokens) if tokens.peek() == "(" else [], returns)
    while tokens.peek().startswith("."):
        token = tokens.next()
        match token.text:
            case ".maxntid" | ".reqntid":
                function.max_threads = tokens.integer()
                while tokens.accept(","):
                    function.max_threads *= tokens.integer()
            case ".minnctapersm" | ".maxnreg":
                tokens.integer()
            case ".noreturn":
                pass
            case ".pragma":
                tokens.next()
                tokens.expect(";")
            case _:
                tokens.fail(f"unknown directive {token.text!r}", token, "unsupported")
    if not tokens.accept(";"):
        tokens.expect("{")
        function.defined = True
        Body(tokens, function).parse()
    return function

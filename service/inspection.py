"""`numbaflash inspect`: figures of `numbaflash.cuda.inspection` as tables or JSON, and the listings as files."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from numbaflash.cache.inspection import inspect_step
from numbaflash.cuda.inspection import FLASH_ATTENTION_2, KernelFacts, Peer, inspect

# What an MMA costs the issue slots and each pipe: the rows of the hot loop.
_PIPES = {
    "issue": "instructions",
    "tensor": "cycles of the tensor cores",
    "smem": "... of shared memory",
    "mufu": "... of special functions",
    "fma": "... of float32 and products",
    "alu": "... of integers, comparisons",
}
_WIDTH = 80


def run(*, json: bool, ptx: Path | None, sass: Path | None, **options: Any) -> None:
    """Inspect the kernels of one problem and print the figures; write listings where asked to.

    Args:
        json: Print one JSON object.
        ptx: File for the PTX text of all kernels, one after the other.
        sass: File for their machine code.
        **options: Of `numbaflash.cuda.inspection.inspect`.

    Raises:
        ValueError: There is no such problem.
        RuntimeError: The compilers are missing.
        OSError: A file cannot be written.
    """
    kernels = inspect(**options)
    _write_listings(kernels, ptx, sass)
    peer = _peer_of(options)
    if json:
        theirs = None if peer is None else asdict(peer)
        print(dumps({"problem": _plain(options), "kernels": _figures(kernels), "flash_attention_2": theirs}))
        return
    console = Console(width=_WIDTH)
    console.print(escape(_title(options)), style="bold")
    _print_kernels(console, kernels, peer, ptx, sass)


def run_step(*, json: bool, ptx: Path | None, sass: Path | None, **options: Any) -> None:
    """Inspect a step of decode over a cache, likewise.

    Args:
        json: As in `run`.
        ptx: Likewise.
        sass: Likewise.
        **options: Of `numbaflash.cache.inspection.inspect_step`.

    Raises:
        ValueError: There is no such step.
        RuntimeError: The compilers are missing.
        OSError: A file cannot be written.
    """
    step = inspect_step(**options)
    _write_listings(step.kernels, ptx, sass)
    counted = {"held_bytes": step.held_bytes, "read_bytes": step.read_bytes, "written_bytes": step.written_bytes}
    if json:
        print(dumps({"step": _plain(options), "kernels": _figures(step.kernels), **counted}))
        return
    console = Console(width=_WIDTH)
    console.print(_step_title(options), style="bold", highlight=False)
    _print_kernels(console, step.kernels, None, ptx, sass)
    held = step.held_bytes
    console.print(
        f"Bytes of the pages that are seen: {held:,}; read: {step.read_bytes:,} ({step.read_bytes / held:.2f})"
    )
    console.print(f"... written: {step.written_bytes:,} ({step.written_bytes / held:.2f})")


def _write_listings(kernels: list[KernelFacts], ptx: Path | None, sass: Path | None) -> None:
    for path, texts in ((ptx, [kernel.ptx for kernel in kernels]), (sass, [kernel.sass for kernel in kernels])):
        if path is not None:
            path.write_text("\n".join(texts))


def _figures(kernels: list[KernelFacts]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(k).items() if name not in ("ptx", "sass")} for k in kernels]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _print_kernels(
    console: Console, kernels: list[KernelFacts], peer: Peer | None, ptx: Path | None, sass: Path | None
) -> None:
    for kernel in kernels:
        console.print(_table(kernel, peer))
        if kernel.loop is not None:
            mix = "  ".join(f"{name} {count}" for name, count in kernel.loop.mix.items() if count > 1)
            console.print(f"Opcodes of the loop: {mix}", highlight=False)
    for kind, path in (("PTX", ptx), ("SASS", sass)):
        if path is not None:
            console.print(f"{kind} written to {path}", highlight=False, soft_wrap=True)


def _table(kernel: KernelFacts, peer: Peer | None) -> Table:
    table = Table(title=kernel.name, title_justify="left", width=_WIDTH)
    table.add_column("built code", ratio=1)
    table.add_column("numbaflash", justify="right", no_wrap=True)
    if peer is not None:
        table.add_column("FlashAttention-2", justify="right", no_wrap=True)

    def add(name: str, ours: object = "", theirs: object = "") -> None:
        table.add_row(name, str(ours), *([] if peer is None else [str(theirs)]))

    add("threads of a block", kernel.threads)
    add("registers a thread", kernel.registers)
    add("bytes spilled a thread", kernel.spill_bytes, f"{peer.spills} registers" if peer else "")
    add("shared memory of a block", f"{kernel.shared_bytes / 1024:g} KiB")
    limits = " and ".join(kernel.occupancy.limits)
    add(f"blocks per multiprocessor (limit: {limits})", kernel.occupancy.blocks)
    add("instructions of the kernel", kernel.instructions)
    table.add_section()
    loop = kernel.loop
    if loop is not None:
        add("[bold]hot loop, one round of a warp[/bold]")
        add("instructions", loop.instructions, peer.instructions if peer else "")
        add("... when no row's maximum is raised", loop.usual_instructions)
        add("MMAs among them", loop.mmas, peer.mmas if peer else "")
        for pipe, name in _PIPES.items():
            ours, theirs = loop.cycles_per_mma.get(pipe, 0.0), peer.cycles_per_mma[pipe] if peer else 0.0
            add(f"for each MMA: {name}", f"{ours:.2f}", f"{theirs:.2f}")
        busy = f"tensor cores busy, by the model, {loop.warps} warps"
        add(busy, f"{loop.tensor_share:.0%}", f"{peer.tensor_share:.0%}" if peer else "")
        table.add_section()
    add("[bold]as it ran on the emulator[/bold]")
    add("bank conflicts, of all wavefronts", f"{kernel.bank_conflicts} of {kernel.shared_wavefronts}")
    add("32-byte sectors, share of them wanted", f"{kernel.sectors}, {kernel.sector_efficiency:.0%}")
    return table


def _title(options: dict[str, Any]) -> str:
    head_dim, value_dim = options["head_dim"], options["value_dim"]
    dims = f"head_dim {head_dim}" + (f", value_dim {value_dim}" if value_dim not in (None, head_dim) else "")
    on = [name for name in ("causal", "alibi", "sinks", "lengths", "lse") if options[name]]
    left, right = ("" if side is None else side for side in options["window"])
    on += [f"window {left}:{right}"] if options["window"] != (None, None) else []
    on += ["softcap"] if options["softcap"] else []
    on += [f"bias {options['bias']}"] if options["bias"] != "none" else []
    major, minor = options["cc"]
    return ", ".join([options["algorithm"], options["dtype"], dims, *on, f"sm_{major}{minor}"])


def _step_title(options: dict[str, Any]) -> str:
    major, minor = options["cc"]
    heads = f"{options['q_heads']}/{options['kv_heads']} heads of {options['head_dim']}"
    tokens = f"{options['new_tokens']} behind {options['tokens']} tokens"
    on = [name for name in ("softcap", "alibi", "sinks") if options[name]]
    stored = options["kv_dtype"] or options["dtype"]
    return ", ".join(["decode", f"{options['dtype']} in {stored}", heads, tokens, *on, f"sm_{major}{minor}"])


def _peer_of(options: dict[str, Any]) -> Peer | None:
    """FlashAttention-2's figures, where they are of the same problem."""
    plain = not any(options[name] for name in ("softcap", "alibi", "sinks", "lengths")) and options["bias"] == "none"
    same = options["dtype"] != "float32" and options["cc"] == (8, 0) and options["window"] == (None, None)
    own_width = options["value_dim"] in (None, options["head_dim"])
    if not (plain and same and own_width and options["algorithm"] == "v2"):
        return None
    return FLASH_ATTENTION_2.get((options["head_dim"], options["causal"]))

"""Arguments of any size to the kernels' C ABI: ``python -m tests.fuzz.c_abi LIBRARY SECONDS [SEED]``.

Nothing is launched: pointers lead nowhere, and every call asks for something that is to be refused. What a workspace
needs is counted here in Python's integers. In a process of its own, which a crash ends.
"""

import random
import sys
import time
from pathlib import Path

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary, LinearArgs
from tests.fuzz.harness import check_sentence

SIZES = [0, 1, 2, 3, 4, 7, 8, 64, 96, 112, 128, 255, 256, 4096, 65535, 65536, 151_936]
EXTREMES = [2**20, 2**24, 2**27, 2**30, 2**31 - 1, 2**31 - 64, -1, -(2**31)]
NOWHERE, ODD = 1 << 40, (1 << 40) + 4
"""Pointers: aligned to 16 bytes, and not."""
FLOATS = [0.125, 0.0, -1.0, 1e38, float("inf"), float("nan")]


def cache(draw: random.Random) -> Cache:
    formats = draw.choice([(0, 0), (1, 1), (2, 2), (2, 3), (3, 3), (3, 2), (0, 1), (4, 0), (-1, 2)])
    return Cache(
        **dict.fromkeys(("key", "value", "key_scale", "value_scale"), NOWHERE),
        key_format=formats[0],
        value_format=formats[1],
        capacity=number(draw, 4096),
        rotated=draw.choice([0, 1]),
    )


def number(draw: random.Random, usual: int) -> int:
    return draw.choice([usual] * 6 + [draw.choice(SIZES), draw.choice(EXTREMES), draw.randrange(-(2**31), 2**31)])


def pointer(draw: random.Random) -> int:
    return draw.choice([NOWHERE] * 40 + [0, ODD])


def attention(draw: random.Random) -> AttentionArgs:
    causal = draw.choice([0, 1, 1])
    heads, dim = (16, 64) if not causal else (32, 128)
    sizes = {"batch": 1, "num_heads": heads, "num_kv_heads": 8 if causal else heads, "key_dim": dim, "value_dim": dim}
    return AttentionArgs(
        **{name: pointer(draw) for name in ("q", "k", "v", "out", "cu_seqlens")},
        **{name: draw.choice([0, NOWHERE]) for name in ("past_length", "past_visible", "recent_length")},
        **{name: number(draw, size) for name, size in sizes.items()},
        seq=number(draw, draw.choice([1, 512])),
        num_sequences=number(draw, 1),
        softmax_scale=draw.choice([0.125] * 10 + FLOATS),
        causal=causal,
        cache=cache(draw),
        recent=cache(draw),
    )


def linear(draw: random.Random) -> LinearArgs:
    bits = number(draw, draw.choice([4, 8, 16]))
    return LinearArgs(
        **{name: pointer(draw) for name in ("x", "weight", "out")},
        **{name: draw.choice([0, pointer(draw)]) for name in ("zero", "bias", "residual")},
        scale=0 if bits == 16 else pointer(draw),
        rows=number(draw, draw.choice([1, 8, 512])),
        in_features=number(draw, 2560),
        out_features=number(draw, 9728),
        bits=bits,
        group=number(draw, 128),
        activation=draw.choice([0, 1, 2, 3, -1]),
    )


def bounds_of_attention(a: AttentionArgs) -> tuple[int, int]:
    """Of its workspace, in bytes."""
    rows = a.batch * a.num_heads
    if a.causal and a.seq == 1 and a.past_length and not a.past_visible:
        partial = rows * (a.value_dim + 4) * 4
        return partial, 2 * 512 * partial
    quantised = a.causal and a.past_length and a.cache.key_format >= 2
    return (rows * a.seq * (128 + 4),) * 2 if quantised else (0, 0)


def bounds_of_linear(a: LinearArgs) -> tuple[int, int]:
    """Of its workspace, in bytes."""
    partial = 8 * a.rows * a.out_features * 4
    if a.bits == 16:
        return 0, partial
    groups = -(-a.in_features // a.group)
    codes = max(a.rows, 8) * groups * a.group
    scales = groups * a.rows * 4 * (2 if a.zero else 1)
    return codes + scales, codes + 2 * groups * (a.rows + 63) * 4 + partial


def told(call, *arguments) -> str | None:
    """The sentence by which a call is refused."""
    try:
        call(*arguments)
    except UserError as error:
        check_sentence(str(error))
        return str(error)
    return None


def case(library: KernelLibrary, draw: random.Random) -> bool:
    """Returns whether the arguments were taken."""
    kind = draw.choice(["attention", "attention", "linear", "linear", "append"])
    if kind == "append":
        a = AppendArgs(
            key=0,  # refused, if nothing before it is
            value=NOWHERE,
            **{name: number(draw, 8) for name in ("layers", "batch", "num_kv_heads", "seq")},
            **{name: number(draw, 128) for name in ("key_dim", "value_dim")},
            slots=NOWHERE,
            cache=cache(draw),
            **{name: draw.randrange(-(2**63), 2**63) for name in ("key_stride", "value_stride")},
        )
        assert told(library.kv_append, a)
        return False
    arguments, workspace_of, launch, bounds = (
        (attention(draw), library.attention_workspace, library.attention, bounds_of_attention)
        if kind == "attention"
        else (linear(draw), library.linear_workspace, library.linear, bounds_of_linear)
    )
    if sentence := told(workspace_of, arguments):
        assert told(launch, arguments, NOWHERE, 1 << 62) == sentence
        return False
    needed = workspace_of(arguments)
    least, most = bounds(arguments)
    assert least <= needed <= most, f"{least} <= {needed} <= {most}"
    if needed:
        assert told(launch, arguments, NOWHERE, needed - 1)
        assert told(launch, arguments, ODD, needed)
    return True


def main() -> None:
    path, seconds, *seed = sys.argv[1:]
    library = KernelLibrary(Path(path))
    end, counts = time.monotonic() + float(seconds), [0, 0]
    for number_of_case in map(int, seed) if seed else range(1 << 62):
        if time.monotonic() > end and sum(counts):
            break
        print(number_of_case, file=sys.stderr)
        counts[case(library, random.Random(number_of_case))] += 1
    print(*counts)


if __name__ == "__main__":
    main()

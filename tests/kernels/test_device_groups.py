"""The Triton kernels against a float64 loop over the groups, and their compilation for GPUs that are not there.

Without CUDA the kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from peft_sieve.kernels import device_groups  # noqa: E402
from peft_sieve.kernels.device_groups import DeviceGroups  # noqa: E402
from peft_sieve.kernels.dropout import Dropout  # noqa: E402
from peft_sieve.kernels.groups import ProductOptions  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["contiguous", "transposed", "slice", "every_second"]

# Gaps before, between and behind; two empty groups; one row; more rows than a tile.
ROWS = 140
BOUNDS = [(3, 40), (40, 40), (40, 41), (41, 41), (60, 133)]
EVERYTHING = [(0, ROWS)]


def _random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> torch.Tensor:
    """Random values, as a view of what `layout` says."""
    *leading, rows, width = shape
    stored = {
        "contiguous": (*leading, rows, width),
        "transposed": (*leading, width, rows),
        "slice": (*leading, rows, width + 5),
        "every_second": (*leading, rows, 2 * width),
    }[layout]
    values = torch.randn(stored, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    views = {
        "contiguous": values,
        "transposed": values.mT,
        "slice": values[..., 2 : 2 + width],
        "every_second": values[..., ::2],
    }
    return views[layout]


def _groups(bounds: list[tuple[int, int]]) -> DeviceGroups:
    return DeviceGroups(*torch.tensor(bounds, dtype=torch.int32, device=DEVICE).unbind(1))


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """At most one rounding to the dtype of `actual`, on top of float32 sums of `terms` terms.

    Args:
        magnitude: the sum with the absolute value of every term.
    """
    info = torch.finfo(actual.dtype)
    sums = (terms + 4) * torch.finfo(torch.float32).eps * magnitude
    bound = sums + info.eps / 2 * (expected.abs() + sums) + info.smallest_normal * info.eps
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


def _check_multiply(
    x: torch.Tensor,
    matrices: torch.Tensor,
    out: torch.Tensor,
    *,
    bounds: list[tuple[int, int]] = BOUNDS,
    alpha: float = 1.0,
    accumulate: bool = False,
    mask_x: torch.Tensor | float = 1.0,
    mask_out: torch.Tensor | float = 1.0,
    **dropout: Any,
) -> None:
    """Multiply, and compare rows in groups with the loop, and everything else in storage with what was there."""
    storage = out if out._base is None else out._base
    before, old = storage.clone(), out.double()
    _groups(bounds).multiply(x, matrices, out, ProductOptions(alpha=alpha, accumulate=accumulate, **dropout))

    masked = x.double() * mask_x
    rounded = matrices.to(x.dtype).double()
    expected, magnitude = old.clone(), torch.zeros_like(old)
    for group, (start, end) in enumerate(bounds):
        rows = slice(start, end)
        product = alpha * masked[rows] @ rounded[group]
        terms = abs(alpha) * masked[rows].abs() @ rounded[group].abs()
        expected[rows], magnitude[rows] = product, terms
    expected, magnitude = expected * mask_out, magnitude * mask_out
    inside = torch.zeros(len(x), dtype=torch.bool, device=DEVICE)
    for start, end in bounds:
        inside[start:end] = True
    if accumulate:
        expected, magnitude = expected + old, magnitude + old.abs()
    _assert_close(out[inside], expected[inside], magnitude[inside], x.shape[1])

    untouched = torch.as_strided(before, out.shape, out.stride(), out.storage_offset())
    untouched[inside] = out[inside]
    assert torch.equal(storage, before)


def _check_outer(
    x: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    *,
    bounds: list[tuple[int, int]] = BOUNDS,
    alpha: float = 1.0,
    mask: torch.Tensor | float = 1.0,
    dropout: Dropout | None = None,
) -> None:
    storage = out if out._base is None else out._base
    before = storage.clone()
    _groups(bounds).outer(x, y, out, ProductOptions(alpha=alpha, dropout=dropout))

    left, right = x.double(), y.to(x.dtype).double() * mask
    for group, (start, end) in enumerate(bounds):
        product = alpha * left[start:end].T @ right[start:end]
        magnitude = abs(alpha) * left[start:end].abs().T @ right[start:end].abs()
        _assert_close(out[group], product, magnitude, end - start)
        if start == end:
            assert not out[group].any()
    torch.as_strided(before, out.shape, out.stride(), out.storage_offset()).copy_(out)
    assert torch.equal(storage, before)


def _mask(rows: int, width: int, dropout: Dropout) -> torch.Tensor:
    """The mask of a matrix, its scaling included: what `multiply` makes of ones. float64."""
    x, matrices = torch.ones(rows, 1, device=DEVICE), torch.ones(1, 1, width, device=DEVICE)
    out = torch.empty(rows, width, device=DEVICE)
    _groups([(0, rows)]).multiply(x, matrices, out, ProductOptions(dropout=dropout, drop_output=True))
    return out.double()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(70, 1), (3, 130), (100, 16), (33, 70)])
def test_multiply(k: int, n: int, dtype: torch.dtype, accumulate: bool) -> None:
    x, matrices = _random(ROWS, k, dtype=dtype), _random(len(BOUNDS), k, n, dtype=dtype, seed=1)
    _check_multiply(x, matrices, _random(ROWS, n, dtype=dtype, seed=2), alpha=-0.75, accumulate=accumulate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 70), (3, 64), (16, 100), (33, 37)])
def test_outer(m: int, n: int, dtype: torch.dtype) -> None:
    x, y = _random(ROWS, m, dtype=dtype), _random(ROWS, n, dtype=dtype, seed=1)
    _check_outer(x, y, _random(len(BOUNDS), m, n, dtype=dtype, seed=2), alpha=-0.75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("turn", range(len(LAYOUTS)))
def test_any_strides(turn: int, dtype: torch.dtype) -> None:
    """Every operand in every layout, and never two of a call in the same."""
    first, second, third, _ = LAYOUTS[turn:] + LAYOUTS[:turn]
    x, y = _random(ROWS, 35, dtype=dtype, layout=first), _random(ROWS, 70, dtype=dtype, layout=second, seed=1)
    matrices = _random(len(BOUNDS), 35, 70, dtype=dtype, layout=second, seed=2)
    _check_multiply(x, matrices, _random(ROWS, 70, dtype=dtype, layout=third, seed=3), accumulate=True)
    _check_outer(x, y, _random(len(BOUNDS), 35, 70, dtype=dtype, layout=third, seed=4))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_operands_and_results_of_different_dtypes(half: torch.dtype) -> None:
    x, parameters = _random(ROWS, 40, dtype=half), _random(len(BOUNDS), 40, 20, seed=1)
    _check_multiply(x, parameters, _random(ROWS, 20, dtype=half, seed=2), alpha=2)
    _check_multiply(x, parameters, _random(ROWS, 20, seed=2), accumulate=True)
    _check_outer(x, _random(ROWS, 20, dtype=half, seed=3), _random(len(BOUNDS), 40, 20, seed=4))
    _check_outer(x, _random(ROWS, 20, seed=3), _random(len(BOUNDS), 40, 20, dtype=half, seed=4))


def test_wider_than_a_tile_in_every_direction() -> None:
    """Several steps of the sum and several tiles each way; ranks up to 128 have one tile."""
    bounds = [(0, 290), (295, 300)]
    x, wide = _random(600, 150, dtype=torch.bfloat16), _random(600, 140, dtype=torch.bfloat16, seed=1)
    _check_multiply(
        x, _random(2, 150, 140, dtype=torch.bfloat16, seed=2), _random(600, 140, dtype=torch.bfloat16), bounds=bounds
    )
    _check_outer(x, wide, _random(2, 150, 140, seed=3), bounds=bounds)


def test_many_groups() -> None:
    bounds = [(row, row + row % 3) for row in range(0, 35 * 2, 2)]
    _check_multiply(_random(ROWS, 5), _random(len(bounds), 5, 7, seed=1), _random(ROWS, 7, seed=2), bounds=bounds)
    _check_outer(_random(ROWS, 5), _random(ROWS, 7, seed=1), _random(len(bounds), 5, 7, seed=2), bounds=bounds)


def test_nothing_to_do() -> None:
    empty = [(0, 0), (0, 0)]
    _check_multiply(_random(ROWS, 5), _random(2, 5, 7), _random(ROWS, 7, seed=2), bounds=empty)
    _check_multiply(_random(0, 5), _random(2, 5, 7), _random(0, 7), bounds=empty)
    _check_outer(_random(0, 5), _random(0, 7), _random(2, 5, 7), bounds=empty)
    none = DeviceGroups(*torch.empty(2, 0, dtype=torch.int32, device=DEVICE))
    out = _random(ROWS, 7)
    none.multiply(_random(ROWS, 5), _random(0, 5, 7), out)
    assert torch.equal(out, _random(ROWS, 7))
    none.outer(_random(ROWS, 5), _random(ROWS, 7), _random(0, 5, 7))


def test_rows_outside_groups_are_not_read() -> None:
    """Not even to be multiplied by zero: they may hold anything."""
    x, y = _random(ROWS, 20), _random(ROWS, 30, seed=1)
    inside = torch.cat([torch.arange(*pair) for pair in BOUNDS]).to(DEVICE)
    spoiled_x, spoiled_y = torch.full_like(x, torch.nan), torch.full_like(y, torch.nan)
    spoiled_x[inside], spoiled_y[inside] = x[inside], y[inside]
    out = torch.zeros(ROWS, 30, device=DEVICE)
    _groups(BOUNDS).multiply(spoiled_x, _random(len(BOUNDS), 20, 30), out)
    sums = torch.zeros(len(BOUNDS), 20, 30, device=DEVICE)
    _groups(BOUNDS).outer(spoiled_x, spoiled_y, sums)
    assert out.isfinite().all() and sums.isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    groups = _groups(BOUNDS)
    x, matrices, out = _random(ROWS, 5), _random(len(BOUNDS), 5, 7), _random(ROWS, 7)
    with pytest.raises(ValueError, match="matrices has shape"):
        groups.multiply(x, matrices.mT, out)
    with pytest.raises(ValueError, match="out has shape"):
        groups.multiply(x, matrices, out[1:])
    with pytest.raises(ValueError, match="ends has shape"):
        DeviceGroups(groups.starts, groups.ends[1:]).multiply(x, matrices, out)
    with pytest.raises(ValueError, match="y has shape"):
        groups.outer(x, out[1:], matrices)
    with pytest.raises(ValueError, match="out has shape"):
        groups.outer(x, out, matrices[:1])
    together = DeviceGroups(groups.starts, groups.ends, own=2)  # three matrices, the last for three groups
    with pytest.raises(ValueError, match="matrices has shape"):
        together.multiply(x, matrices, out)
    with pytest.raises(ValueError, match="matrices has shape"):
        together.outer(x, out, matrices[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_mask_for_all_three_uses(dtype: torch.dtype) -> None:
    """Forward and backward agree on a mask although they cut the matrix into different tiles."""
    dropout, width, rank = Dropout(p=0.4, seed=2**62 + 12345), 90, 20
    mask = _mask(ROWS, width, dropout)
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.6))}
    wide, narrow = _random(ROWS, width, dtype=dtype), _random(ROWS, rank, dtype=dtype, seed=1)
    down = _random(len(BOUNDS), width, rank, dtype=dtype, seed=2)
    rows = _random(ROWS, rank, dtype=dtype, seed=3)
    _check_multiply(wide, down, rows, alpha=0.5, accumulate=True, dropout=dropout, mask_x=mask)
    rows = _random(ROWS, width, dtype=dtype, seed=3)
    options = {"dropout": dropout, "drop_output": True}
    _check_multiply(narrow, down.mT, rows, alpha=0.5, accumulate=True, mask_out=mask, **options)
    _check_outer(narrow, wide, _random(len(BOUNDS), rank, width), alpha=0.5, dropout=dropout, mask=mask)


def test_infinite_elements_can_be_dropped() -> None:
    dropout = Dropout(p=0.5, seed=7)
    kept = _mask(ROWS, 40, dropout) != 0
    x = torch.where(kept, 1.0, torch.inf)
    out = torch.empty(ROWS, 1, device=DEVICE)
    _groups(EVERYTHING).multiply(x, torch.ones(1, 40, 1, device=DEVICE), out, ProductOptions(dropout=dropout))
    assert torch.equal(out[:, 0], 2.0 * kept.sum(1))


@pytest.mark.parametrize("p", [0.05, 0.7])
def test_rate_of_dropout(p: float) -> None:
    rows, width = 200, 300
    kept = (_mask(rows, width, Dropout(p, seed=3)) != 0).double()
    # Of all elements, of each row and of each column: within five standard deviations.
    for rates, count in ((kept.mean(), rows * width), (kept.mean(1), width), (kept.mean(0), rows)):
        assert ((rates - (1 - p)).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all()


@pytest.mark.parametrize("other", [4, 3 + 2**31, 3 + 2**32, 3 + 2**62], ids=lambda seed: f"{seed:#x}")
def test_seeds_give_independent_masks(other: int) -> None:
    """Each bit of a seed counts, whichever 32-bit half it is in."""
    rows, width, p = 64, 64, 0.5
    first, again, second = (_mask(rows, width, Dropout(p, seed)) != 0 for seed in (3, 3, other))
    assert torch.equal(first, again)
    agreement = (first == second).double().mean().item()
    assert abs(agreement - 0.5) <= 5 * (0.25 / (rows * width)) ** 0.5


def test_masks_beyond_2_to_32_elements() -> None:
    """The position is not cut to 32 bits: a row that starts at a multiple of 2**32 is not the first one again."""
    width, dropout = 1024, Dropout(p=0.5, seed=11)
    last = 2**32 // width
    x, y = torch.ones(1, 1, device=DEVICE), torch.ones(1, width, device=DEVICE)
    masks = torch.empty(2, 1, width, device=DEVICE)
    groups = _groups([(0, 1), (last, last + 1)])
    # Of stride zero, so that the rows need no memory.
    groups.outer(x.expand(last + 1, 1), y.expand(last + 1, width), masks, ProductOptions(dropout=dropout))
    agreement = (masks[0] == masks[1]).double().mean().item()
    assert abs(agreement - 0.5) <= 5 * (0.25 / width) ** 0.5


def test_offsets_beyond_2_to_31_elements() -> None:
    last, stride = 2**16, 2**15
    try:
        storage = torch.empty(last * stride + 20, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GB cannot be allocated, not even without being used")
    rows = storage.as_strided((last + 1, 20), (stride, 1))
    rows[last] = 1
    out = torch.empty(1, 20, 3, device=DEVICE)
    _groups([(last, last + 1)]).outer(rows, torch.ones(1, 3, device=DEVICE).expand(last + 1, 3), out)
    assert (out == 1).all()


@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 5)], ids=["", "dropout"])
def test_same_bits_every_time(dropout: Dropout | None) -> None:
    x, y, matrices = _random(ROWS, 35), _random(ROWS, 33, seed=1), _random(len(BOUNDS), 35, 33, seed=2)
    rows, sums = torch.zeros(2, ROWS, 33, device=DEVICE), torch.zeros(2, len(BOUNDS), 35, 33, device=DEVICE)
    for turn in range(2):
        _groups(BOUNDS).multiply(x, matrices, rows[turn], ProductOptions(dropout=dropout))
        _groups(BOUNDS).outer(x, y, sums[turn], ProductOptions(dropout=dropout))
    assert torch.equal(rows[0], rows[1]) and torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_hardware(capability: int, tmp_path: Path) -> None:
    """Down to machine code, in the sizes of real layers, and within the shared memory of the smallest GPUs."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("Triton has no backend for NVIDIA here")
    # In a process of its own: functions decorated for the interpreter cannot be compiled.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = f"from {__name__} import compile_all; compile_all({capability})"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 13
    for result in results:
        assert result["elf"] and result["size"] > 1000, result
        assert 0 < result["shared"] < 100 * 1024, result


def compile_all(capability: int) -> None:
    """Compile every variant of the kernels; one line of JSON each. Tiles are the largest that the sizes lead to."""
    dropout = {"dropout": Dropout(p=0.1, seed=2**62)}
    drop_output, accumulate = dropout | {"drop_output": True}, {"accumulate": True}
    bfloat16, float16, float32 = DTYPES
    calls: list[tuple[Any, ...]] = [
        # float16 goes the way of bfloat16.
        ("multiply", float16, float16, 2048, 128, accumulate),
        ("multiply", float16, float16, 128, 2048, drop_output),
        ("outer", float16, float16, 128, 2048, {}),
        ("multiply", bfloat16, float32, 2048, 128, dropout),
        ("multiply", bfloat16, float32, 128, 2048, accumulate),
    ]
    for dtype in (bfloat16, float32):
        calls.append(("multiply", dtype, dtype, 2048, 128, {}))
        calls.append(("multiply", dtype, dtype, 2048, 128, dropout))
        calls.append(("multiply", dtype, dtype, 128, 2048, drop_output | accumulate))
        calls.append(("outer", dtype, dtype, 128, 2048, dropout))
    for method, *call in calls:
        kernel, arguments = _launch(method, *call)
        options = {name: arguments[name] for name in ("num_warps", "num_stages")}
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        compiled = triton.compile(_source(kernel, arguments), target=target, options=options)
        cubin = compiled.asm["cubin"]
        result = {"call": repr((method, *call)), "shared": compiled.metadata.shared}
        print(json.dumps(result | {"size": len(cubin), "elf": cubin[:4] == b"\x7fELF"}), flush=True)


def _launch(
    method: str, dtype: torch.dtype, second: torch.dtype, inner: int, n: int, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The kernel that a call launches and its arguments by name, on tensors without memory."""
    rows, groups = 131072, 64
    name = f"{method}_kernel"
    kernel = getattr(device_groups, name)
    launches: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launches.append(dict(zip(kernel.arg_names, args, strict=False), **kwargs))

    with pytest.MonkeyPatch.context() as monkeypatch, torch.device("meta"):
        monkeypatch.setattr(device_groups, name, Recorder())
        if method == "multiply":
            empty = [
                torch.empty(rows, inner, dtype=dtype),
                torch.empty(groups, inner, n, dtype=second),
                torch.empty(rows, n, dtype=dtype),
            ]
        else:
            empty = [
                torch.empty(rows, inner, dtype=dtype),
                torch.empty(rows, n, dtype=second),
                torch.empty(groups, inner, n),
            ]
        ranges = DeviceGroups(*torch.empty(2, groups, dtype=torch.int32))
        getattr(ranges, method)(*empty, ProductOptions(**options))
    return kernel, launches[0]


def _source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """What Triton's launcher would compile: ones are constants, and multiples of 16 are known to be some."""
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{types[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)

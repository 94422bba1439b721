"""Counter-based noise: Philox itself, and the uniform and normal numbers made of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow import ops, reference
from fastflow.ops.noise import reference as plain_noise
from tests.support.cases import CUDA, STATIC, TRACED, TRITON_AND_CPU, assert_as_reference

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

# the kernels draw the same bits (uniform) or within rounding (normal), so their statistics are these
statistics = pytest.mark.bodies("reference", "compiled", CUDA)
OP = torch.ops.fastflow.uniform_noise.default

# Random123's known answers for philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def key(low, high):
    """Both words of a key as one int64, as a seed holds them."""
    value = high << 32 | low
    return torch.tensor(value - (1 << 64) if value >= 1 << 63 else value)


@pytest.mark.parametrize("counter, words, expected", KNOWN)
def test_known_answers(counter, words, expected):
    found = reference.philox(tuple(torch.tensor(c) for c in counter), key(*words))
    assert tuple(int(v) for v in found) == expected


def philox_of_ints(counter, seed):
    """Philox in Python's own integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    sample=st.integers(0, 2**40),
    element=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_where_each_number_comes_from(seed, sample, element, dtype):
    """Counter (block, stream, low and high word of the sample); eight uniform or four normal numbers from a block."""
    shape = [1, element + 1]
    low, high = sample & 0xFFFFFFFF, sample >> 32
    words = philox_of_ints((element // 8, 0, low, high), seed)
    half = words[element // 2 % 4] >> 16 * (element % 2) & 0xFFFF
    uniform = ops.uniform_noise(shape, seed=seed, offset=sample, dtype=dtype)
    assert uniform.dtype == dtype and uniform[0, element].item() == half / 65536
    words = philox_of_ints((element // 4, 1, low, high), seed)
    first, second = words[element % 4 // 2 * 2 :][:2]
    radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), second / 2**32 * 2 * math.pi
    normal = reference.normal_noise(shape, torch.tensor(seed), sample, torch.float64)
    assert normal[0, element].item() == pytest.approx(
        radius * (math.sin if element % 2 else math.cos)(angle), rel=1e-12, abs=1e-12
    )


NOISES = {
    "uniform": lambda size, seed, offset=0: ops.uniform_noise(size, seed=seed, offset=offset),
    "normal": lambda size, seed, offset=0: ops.gaussian_sample(size, seed=seed, offset=offset),
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES.keys())


STARTS = [0, 7, 2**32 - 3, 2**40]


@pytest.mark.bodies("reference", "compiled", CUDA)
@each_noise
@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    start=st.sampled_from(STARTS),
    seed=st.integers(0, 2**62),
)
def test_split_over_offsets_is_the_whole_batch(noise, parts, start, seed):
    check_split(noise, parts, start, seed)


@pytest.mark.bodies("interpreter")
@each_noise
@pytest.mark.parametrize("start", STARTS)
def test_interpreted_split_over_offsets_is_the_whole_batch(noise, start):
    check_split(noise, [1, 0, 4], start, 2**61 + 5)


def check_split(noise, parts, start, seed):
    whole = noise((sum(parts), 3, 5), seed, start)
    offsets = [start + sum(parts[:i]) for i in range(len(parts))]
    split = [noise((n, 3, 5), seed, offset) for n, offset in zip(parts, offsets, strict=True)]
    assert torch.equal(torch.cat(split), whole)


@each_noise
def test_seed_and_sample_decide(noise):
    x = noise((4, 50), 1)
    assert torch.equal(x, noise((4, 50), 1)) and torch.equal(x, noise((4, 50), torch.tensor(1)))
    assert not torch.equal(x, noise((4, 50), 2)) and not torch.equal(x, noise((4, 50), 1 + 2**32))
    assert len({tuple(row.tolist()) for row in x}) == 4
    assert not torch.equal(NOISES["uniform"]((1, 4), 1), NOISES["normal"]((1, 4), 1))


def test_a_larger_sample_starts_with_the_same_numbers():
    small, large = (ops.uniform_noise((3, d), seed=5) for d in (13, 40))
    assert torch.equal(small, large[:, :13])
    assert torch.equal(ops.uniform_noise((3, 4, 10), seed=5).flatten(1), large)


@pytest.mark.bodies("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_of_several_tiles(dtype):
    assert_as_reference(OP, [2, 9001], torch.tensor(3), 2**33, dtype)


@statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_a_multiple_below_one(dtype):
    u = ops.uniform_noise((64, 4096), seed=3, dtype=dtype)
    k = u * 65536
    assert torch.equal(k, k.floor()) and u.min() >= 0 and u.max() < 1
    assert (
        k.max() == 65535 and k.min() == 0
    )  # 262144 draws miss one of 65536 values with odds of 2 %; this seed does not


@statistics
def test_uniform_moments():
    u = ops.uniform_noise((1000, 400), seed=11, dtype=torch.float64).flatten()
    n = u.numel()
    assert abs(u.mean() - 0.5 * (1 - 2**-16)) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


@statistics
def test_normal_moments():
    z = reference.normal_noise([1000, 400], torch.tensor(11), 0, torch.float64).flatten()
    n = z.numel()
    # the variance of z^k's mean is (E z^2k - (E z^k)^2) / n
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * (variance / n) ** 0.5
    cdf = 0.5 * (1 + torch.erf(z.sort().values / 2**0.5))
    assert (
        cdf - (torch.arange(n) + 0.5) / n
    ).abs().max() < 2 / n**0.5  # Kolmogorov and Smirnov: odds of 0.07 %


@statistics
@each_noise
def test_neighbours_are_uncorrelated(noise):
    x = noise((512, 512), 9).double()
    x = x - x.mean()
    for a, b in [(x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:, :-4], x[:, 4:]), (x[:, :-8], x[:, 8:])]:
        assert abs((a * b).mean() / x.var()) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_finite_at_the_ends(dtype, monkeypatch):
    """The logarithm of the smallest and of the largest word, also where float32 rounds the largest up."""
    words = torch.tensor([[[0, 0, 0xFFFFFFFF, 0]]])
    monkeypatch.setattr(plain_noise, "_words", lambda *_: words)
    z = reference.normal_noise([1, 4], torch.tensor(0), 0, dtype)
    assert z.isfinite().all() and 6 < z[0, 0] < 7 and abs(z[0, 2]) < 1e-3


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 2, 2), (1, 1), (0, 5)], ids=str)
def test_opcheck(dtype, size):
    tests = (*STATIC, *TRACED) if len(size) == 4 else STATIC
    torch.library.opcheck(OP, (list(size), torch.tensor(1), 3, dtype), test_utils=tests)


@each_noise
def test_empty(noise):
    assert noise((0, 3, 2), 1).shape == (0, 3, 2) and noise((3, 0), 1).shape == (3, 0)


def test_a_captured_graph_draws_from_its_seed(each_backend):
    """Nothing waits for the device, and a seed on it is read when the graph runs; without a device, calls stand for the graph."""
    seed = torch.tensor(1)

    def draw():
        return ops.uniform_noise((4, 3), seed), ops.uniform_noise((4, 3), 1)

    noise, _ = draw()  # compiles
    if each_backend == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = draw()

        def replay():
            graph.replay()
            return captured
    else:
        replay = draw
    assert all(torch.equal(v, noise) for v in replay())
    seed.fill_(2)
    from_seed, constant = replay()
    assert torch.equal(from_seed, ops.uniform_noise((4, 3), 2)) and torch.equal(constant, noise)

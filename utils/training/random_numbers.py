"""Random numbers by position, not by history: a draw depends on (seed, purpose, epoch, sample) and nothing else.

So neither the number of workers or processes nor a resume changes what a sample gets, and there is no generator state
to save. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a counter-based one.
"""

import zlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64, elementwise."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(count: int, purpose: str, seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """(len(samples), count) float64 in [0, 1): row i depends on (purpose, seed, epochs[i], samples[i]) alone."""
    with np.errstate(over="ignore"):
        state = np.full(len(samples), np.uint64(zlib.crc32(purpose.encode())), dtype=np.uint64)
        for part in (seed & 0xFFFFFFFFFFFFFFFF, epochs, samples):
            state = _mix((state + GOLDEN) ^ np.asarray(part, np.uint64))
        columns = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        return (_mix(state[:, None] + columns[None, :]) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A permutation of 0..n-1 that depends on its arguments alone (NumPy's Philox, keyed)."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, stream))))
    return generator.permutation(n)

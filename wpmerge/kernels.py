"""Compiled loops over blocks of bfloat16: all of a block's arithmetic in one pass through the nearest cache.

The formulas, their order and every rounding are those of :mod:`wpmerge.blocks`, which stays the reference; tests hold
the two equal to the bit on finite values. What is not finite is only detected: each kernel returns the largest
magnitude it met, as bits, and the caller computes such a block again by the reference. No fast-math, so that products
and sums are rounded one by one and the bits depend neither on the processor nor on where its vectors end.

Importing this module imports numba, and first use compiles: only large merges do (:mod:`wpmerge.fused`).

``stored`` is [1 + terms, TILE], the bits of the base and of each term from flat index ``start`` on. The coefficient of
term k at flat index i is values[first[k] + (i // inner[k]) % size[k]]: one number, or a vector along any axis.
The functions named ``read_…`` and ``write_…`` fill it themselves, tile by tile, from ``descriptors`` in which the
tensors begin at byte ``offsets``; those named ``write_…`` also write each tile where ``target`` says, and take its
checksum while it is in the cache. UNREADABLE and UNWRITABLE say that they could not.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from wpmerge.array_kernels import LARGEST_BFLOAT16, UNREADABLE, UNWRITABLE

CHUNK = 2048  # elements that go through all steps together: their float32 values stay in the level-1 cache
TILE = 2**16  # elements of each input that are read at a time: a few of these fit in the level-2 cache

_LOW, _SIGN, _MAGNITUDE = np.uint32(0x7FFF), np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_HALF, _ONE = np.uint32(16), np.uint32(1)
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def _entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first call, to run outside the interpreter's lock; keep the code where a place can be written."""
    try:
        made: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba found no such place
        made = njit(**_OPTIONS)(function)
    return made


_part: Callable[..., Any] = njit(**_OPTIONS)


@_part
def _wide(bits):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(bits) << _HALF).view(np.float32)


@_part
def _bits(number):  # type: ignore[no-untyped-def]
    return np.float32(number).view(np.uint32)


@_part
def _number(bits):  # type: ignore[no-untyped-def]
    return np.uint32(bits).view(np.float32)


@_part
def _rounded(bits):  # type: ignore[no-untyped-def]
    """Bits of a finite float32 to those of the nearest bfloat16, ties to even."""
    return np.uint16(np.uint32(bits + _LOW + ((bits >> _HALF) & _ONE)) >> _HALF)


@_part
def _run(i, n, size, inner):  # type: ignore[no-untyped-def]
    """Where the coefficient of flat index i is, and for how many of n elements it is one number, or one stretch."""
    place = i // inner % size
    return place, min(n, size - place if inner == 1 else inner - i % inner)


@_part
def _add_scalar(term, base, number, total):  # type: ignore[no-untyped-def]
    for i in range(term.shape[0]):
        total[i] = total[i] + (_wide(term[i]) - _wide(base[i])) * number


@_part
def _add_vector(term, base, factor, total):  # type: ignore[no-untyped-def]
    for i in range(term.shape[0]):
        total[i] = total[i] + (_wide(term[i]) - _wide(base[i])) * factor[i]


@_part
def _add(term, base, start, factor, inner, total):  # type: ignore[no-untyped-def]
    done, n, size = 0, term.shape[0], factor.shape[0]
    while done < n:
        place, run = _run(start + done, n - done, size, inner)
        a, b = done, done + run
        if size == 1:
            _add_scalar(term, base, factor[0], total)
            return
        if inner == 1:
            _add_vector(term[a:b], base[a:b], factor[place : place + run], total[a:b])
        else:
            _add_scalar(term[a:b], base[a:b], factor[place], total[a:b])
        done = b


@_part
def _finish(base, total, scale, out):  # type: ignore[no-untyped-def]
    """Round base + scale · total; the largest magnitude of it."""
    worst = np.uint32(0)
    for i in range(base.shape[0]):
        bits = _bits(_wide(base[i]) + total[i] * scale)
        worst = max(worst, np.uint32(bits & _MAGNITUDE))
        out[i] = _rounded(bits)
    return worst


@_part
def _finish_three(base, a, b, c, factor_a, factor_b, factor_c, total, scale, out):  # type: ignore[no-untyped-def]
    """:func:`_add_scalar` of the last three terms and :func:`_finish` in one loop: a third less time."""
    worst = np.uint32(0)
    for i in range(base.shape[0]):
        start = _wide(base[i])
        number = total[i] + (_wide(a[i]) - start) * factor_a
        number = number + (_wide(b[i]) - start) * factor_b
        number = number + (_wide(c[i]) - start) * factor_c
        bits = _bits(start + number * scale)
        worst = max(worst, np.uint32(bits & _MAGNITUDE))
        out[i] = _rounded(bits)
    return worst


_pwrite: Any = types.ExternalFunction("pwrite", types.intp(types.int32, types.uintp, types.uintp, types.int64))
_pread: Any = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@_part
def _read(descriptors, offsets, start, n, stored):  # type: ignore[no-untyped-def]
    """Elements ``start`` to ``start + n`` of every input; whether all could be read."""
    for k in range(descriptors.shape[0]):
        if _pread(descriptors[k], stored[k].ctypes.data, 2 * n, offsets[k] + 2 * start) != 2 * n:
            return False
    return True


@_part
def add_weighted(stored, start, values, first, size, inner, scale, out):  # type: ignore[no-untyped-def]
    """base + scale · Σ_k c_k (term_k - base), as bfloat16 bits in ``out``.

    Returns the largest magnitude before rounding, as float32 bits: that is not finite where an input is not.
    """
    total = np.empty(CHUNK, np.float32)
    worst = np.uint32(0)
    terms = size.shape[0]
    three = terms >= 3 and size[terms - 3 :].max() == 1
    apart = terms - 3 if three else terms
    for low in range(0, out.shape[0], CHUNK):
        high = min(low + CHUNK, out.shape[0])
        base, sums = stored[0, low:high], total[: high - low]
        sums[:] = np.float32(-0.0)  # -0 + x is x, to the sign of a zero
        for k in range(apart):
            _add(stored[1 + k, low:high], base, start + low, values[first[k] : first[k] + size[k]], inner[k], sums)
        if three:
            a, b, c = stored[apart + 1, low:high], stored[apart + 2, low:high], stored[apart + 3, low:high]
            x, y, z = values[first[apart]], values[first[apart + 1]], values[first[apart + 2]]
            worst = max(worst, _finish_three(base, a, b, c, x, y, z, sums, scale, out[low:high]))
        else:
            worst = max(worst, _finish(base, sums, scale, out[low:high]))
    return worst


@_part
def _trim(term, base, least, delta):  # type: ignore[no-untyped-def]
    """term - base where its magnitude's bits are at least ``least``, else 0; the largest magnitude of all."""
    worst = np.uint32(0)
    for i in range(term.shape[0]):
        bits = _bits(_wide(term[i]) - _wide(base[i]))
        magnitude = np.uint32(bits & _MAGNITUDE)
        worst = max(worst, magnitude)
        delta[i] = _number(bits if magnitude >= least else np.uint32(0))
    return worst


@_part
def _count_equal(term, base, threshold):  # type: ignore[no-untyped-def]
    count = np.uint32(0)
    for i in range(term.shape[0]):
        count += np.uint32(np.uint32(_bits(_wide(term[i]) - _wide(base[i])) & _MAGNITUDE) == threshold)
    return np.int64(count)


@_part
def _trim_ties(term, base, threshold, left, k, delta):  # type: ignore[no-untyped-def]
    """Trim one chunk of term k; of those that equal the threshold keep the first ``left[k]``, counted down."""
    if threshold == 0:
        return _trim(term, base, np.uint32(0), delta)
    if left[k] == 0:
        return _trim(term, base, np.uint32(threshold + _ONE), delta)
    worst = _trim(term, base, threshold, delta)
    count = _count_equal(term, base, threshold)
    if count <= left[k]:
        left[k] -= count
        return worst
    for i in range(delta.shape[0]):
        if np.uint32(_bits(delta[i]) & _MAGNITUDE) == threshold:
            if left[k] == 0:
                delta[i] = np.float32(0)
            else:
                left[k] -= 1
    return worst


@_part
def _weigh_scalar(delta, number, total):  # type: ignore[no-untyped-def]
    for i in range(delta.shape[0]):
        delta[i] = delta[i] * number
        total[i] = total[i] + delta[i]


@_part
def _weigh_vector(delta, factor, total):  # type: ignore[no-untyped-def]
    for i in range(delta.shape[0]):
        delta[i] = delta[i] * factor[i]
        total[i] = total[i] + delta[i]


def _by_runs(scalar: Callable[..., Any], vector: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over the stretches of a coefficient: ``scalar`` where it is one number, ``vector`` where it varies."""

    @_part
    def walk(delta, start, factor, inner, total):  # type: ignore[no-untyped-def]
        done, n, size = 0, delta.shape[0], factor.shape[0]
        while done < n:
            place, run = _run(start + done, n - done, size, inner)
            a, b = done, done + run
            if size == 1:
                scalar(delta, factor[0], total)
                return
            if inner == 1:
                vector(delta[a:b], factor[place : place + run], total[a:b])
            else:
                scalar(delta[a:b], factor[place], total[a:b])
            done = b

    made: Callable[..., Any] = walk
    return made


_weigh = _by_runs(_weigh_scalar, _weigh_vector)


@_part
def _agree(delta, total, merged):  # type: ignore[no-untyped-def]
    """Turn entries that have the sign of ``total`` positive and the others to 0, and add them to ``merged``."""
    for i in range(delta.shape[0]):
        turned = _number(_bits(delta[i]) ^ np.uint32(_bits(total[i]) & _SIGN))
        delta[i] = np.float32(0) if turned < 0 else turned
        merged[i] = merged[i] + delta[i]


@_part
def _vote_scalar(delta, number, weight):  # type: ignore[no-untyped-def]
    for i in range(delta.shape[0]):
        weight[i] = weight[i] + (number if delta[i] > 0 else np.float32(0))


@_part
def _vote_vector(delta, factor, weight):  # type: ignore[no-untyped-def]
    for i in range(delta.shape[0]):
        weight[i] = weight[i] + (factor[i] if delta[i] > 0 else np.float32(0))


_vote = _by_runs(_vote_scalar, _vote_vector)


@_part
def _signed_mean(total, merged, weight, normalize):  # type: ignore[no-untyped-def]
    """Give the sum its elected sign and divide it by its weight, into ``total``."""
    for i in range(total.shape[0]):
        number = _number(_bits(merged[i]) ^ np.uint32(_bits(total[i]) & _SIGN))
        if normalize:
            number = number / (np.float32(1) if weight[i] == 0 else weight[i])
        total[i] = number


@_part
def _dot(words, keys):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(words.shape[0]):
        total += words[i] * keys[i]
    return total


@_part
def dot64(bits, first, keys, odds, total):  # type: ignore[no-untyped-def]
    """Add the part of a tensor's dot64 that numbers from flat index ``first`` on have to ``total[0]``.

    ``keys`` are those of :mod:`wpmerge.checksum`, and ``odds`` its odd(j) from j = 0 on. ``first`` is a multiple of 4.
    """
    words, n = bits[: bits.shape[0] // 4 * 4].view(np.uint64), bits.shape[0]
    place = np.int64(first // 4)
    done, period = np.int64(0), np.int64(keys.shape[0])
    while done < words.shape[0]:
        at = (place + done) % period
        stop = min(words.shape[0], done + period - at)
        total[0] += _dot(words[done:stop], keys[at : at + stop - done]) * odds[(place + done) // period]
        done = stop
    if n % 4:
        word = np.uint64(0)
        for i in range(n % 4):
            word |= np.uint64(bits[n - n % 4 + i]) << np.uint64(16 * i)
        total[0] += word * keys[(place + done) % period] * odds[(place + done) // period]


@_part
def _write(target, bits, offset):  # type: ignore[no-untyped-def]
    """Write numbers at a byte offset of a file; whether all could be written."""
    done, size = 0, 2 * bits.shape[0]
    while done < size:
        written = _pwrite(target, bits.ctypes.data + done, size - done, offset + done)
        if written <= 0:
            return False
        done += written
    return True


@_part
def _deliver(target, offset, first, out, keys, odds, total):  # type: ignore[no-untyped-def]
    """Write one tile of a tensor that begins at byte ``offset``, and take its checksum."""
    dot64(out, first, keys, odds, total)
    return _write(target, out, offset + 2 * first)


@_entry
def write_add_weighted(  # type: ignore[no-untyped-def]
    descriptors, offsets, stored, start, stop, values, first, size, inner, scale, target, offset, out, keys, odds, total
):
    """:func:`add_weighted` of elements ``start`` to ``stop`` of what is read, written to a file.

    Returns the largest magnitude, at most LARGEST_BFLOAT16 where all was written; what is larger ends it.
    """
    worst = np.uint32(0)
    for low in range(start, stop, TILE):
        n = min(TILE, stop - low)
        if not _read(descriptors, offsets, low, n, stored):
            return np.uint32(UNREADABLE)
        worst = max(worst, add_weighted(stored, low, values, first, size, inner, scale, out[:n]))
        if worst > LARGEST_BFLOAT16:
            return worst
        if not _deliver(target, offset, low, out[:n], keys, odds, total):
            return np.uint32(UNWRITABLE)
    return worst


@_part
def elect(  # type: ignore[no-untyped-def]
    stored, start, values, first, size, inner, scale, out, thresholds, left, normalize
):
    """TIES' trim, elect and disjoint sum or mean, times ``scale``, plus the base, as bfloat16 bits in ``out``.

    ``thresholds``: per term the bits of what is kept from; 0 keeps all. ``left``: how many that equal it are still to
    be kept, counted down; -1 keeps nothing of the term at all.

    Returns the largest magnitude of any delta and of the result before rounding, as float32 bits.
    """
    terms = size.shape[0]
    deltas = np.empty((terms, CHUNK), np.float32)
    totals, sums, weights = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    worst = np.uint32(0)
    for low in range(0, out.shape[0], CHUNK):
        high = min(low + CHUNK, out.shape[0])
        n = high - low
        base, total, merged, weight = stored[0, low:high], totals[:n], sums[:n], weights[:n]
        total[:] = np.float32(-0.0)  # -0 + x is x, to the sign of a zero
        merged[:] = np.float32(-0.0)
        weight[:] = np.float32(0)
        for k in range(terms):
            term, delta = stored[1 + k, low:high], deltas[k, :n]
            if left[k] < 0:
                worst = max(worst, _trim(term, base, np.uint32(0), delta))
                for i in range(n):
                    delta[i] = delta[i] * np.float32(0)
            else:
                worst = max(worst, _trim_ties(term, base, thresholds[k], left, k, delta))
            _weigh(delta, start + low, values[first[k] : first[k] + size[k]], inner[k], total)
        for k in range(terms):
            delta = deltas[k, :n]
            _agree(delta, total, merged)
            if normalize:
                _vote(delta, start + low, values[first[k] : first[k] + size[k]], inner[k], weight)
        _signed_mean(total, merged, weight, normalize)
        worst = max(worst, _finish(base, total, scale, out[low:high]))
    return worst


@_part
def _look(term, base, low, width, magnitudes):  # type: ignore[no-untyped-def]
    """The bits of |term - base|, less ``low``, into ``magnitudes``; how many are above and within low … low + width."""
    over, inside = np.uint32(0), np.uint32(0)
    high = np.uint32(low + width)
    for i in range(term.shape[0]):
        bits = np.uint32(_bits(_wide(term[i]) - _wide(base[i])) & _MAGNITUDE)
        magnitudes[i] = bits
        over += np.uint32(bits > high)
        inside += np.uint32(np.uint32(bits - low) <= width)
    return np.int64(over), np.int64(inside)


@_part
def _collect(magnitudes, low, width, kept, place):  # type: ignore[no-untyped-def]
    for i in range(magnitudes.shape[0]):
        kept[place] = magnitudes[i]
        place += np.int64(np.uint32(magnitudes[i] - low) <= width)


@_entry
def write_elect(  # type: ignore[no-untyped-def]
    descriptors,
    offsets,
    stored,
    start,
    stop,
    values,
    first,
    size,
    inner,
    scale,
    target,
    offset,
    out,
    keys,
    odds,
    total,
    thresholds,
    left,
    normalize,
):
    """:func:`elect` of elements ``start`` to ``stop`` of what is read, as :func:`write_add_weighted` does it."""
    worst = np.uint32(0)
    for low in range(start, stop, TILE):
        n = min(TILE, stop - low)
        if not _read(descriptors, offsets, low, n, stored):
            return np.uint32(UNREADABLE)
        part = out[:n]
        found = elect(stored, low, values, first, size, inner, scale, part, thresholds, left, normalize)
        worst = max(worst, found)
        if worst > LARGEST_BFLOAT16:
            return worst
        if not _deliver(target, offset, low, part, keys, odds, total):
            return np.uint32(UNWRITABLE)
    return worst


@_part
def look(stored, n, lows, highs, collect, over, inside, kept):  # type: ignore[no-untyped-def]
    """For every term: how many magnitudes of term - base are above a bracket and inside it, and which are inside.

    Looks at n elements and adds to the counts. Magnitudes and brackets are float32 bits. Row k of ``kept`` gets the
    magnitudes that lie inside, in order, from place ``inside[k]`` on, where ``collect[k]`` says so.
    """
    magnitudes = np.empty(CHUNK, np.uint32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        for k in range(lows.shape[0]):
            found, width = magnitudes[: stop - start], np.uint32(highs[k] - lows[k])
            above, within = _look(stored[1 + k, start:stop], stored[0, start:stop], lows[k], width, found)
            if collect[k] and within:
                _collect(found, lows[k], width, kept[k], inside[k])
            over[k] += above
            inside[k] += within


@_entry
def read_look(  # type: ignore[no-untyped-def]
    descriptors, offsets, stored, start, n, lows, highs, collect, over, inside, kept
):
    """:func:`look` at what is read; whether it could be."""
    for low in range(0, n, TILE):
        high = min(low + TILE, n)
        if not _read(descriptors, offsets, start + low, high - low, stored):
            return False
        look(stored, high - low, lows, highs, collect, over, inside, kept)
    return True


def prepare(*, ties: bool) -> None:
    """Compile, or load what was compiled before, ahead of any thread; ``ties``: also what only TIES needs."""
    nothing, stored = np.zeros(0, np.int32), np.zeros((2, TILE), np.uint16)
    one, place, scale = np.ones(1, np.int64), np.zeros(1, np.int64), np.float32(1)
    inputs = nothing, place[:0], stored, 0
    words = np.ones(1, np.uint64)
    coefficients = np.zeros(1, np.float32), place, one, one, scale
    sums = *inputs, 0, *coefficients, -1, 0, np.zeros(TILE, np.uint16), words, words, words.copy()
    bits, kept = np.zeros(1, np.uint32), np.zeros((1, 1), np.uint32)
    calls: list[Callable[[], Any]] = [lambda: write_add_weighted(*sums)]
    if ties:
        calls.append(lambda: write_elect(*sums, bits, place.copy(), True))
        calls.append(lambda: read_look(*inputs, 1, bits, bits, np.ones(1, np.bool_), place.copy(), place.copy(), kept))
    for call in calls:
        try:
            call()
        except OSError:  # it was compiled, but could not be kept: the disk is full, say
            call()

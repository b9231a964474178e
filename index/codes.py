"""How many bits a vector's numbers are kept in: float32, float16, or int8 without any scale.

An int8 vector is its integers divided by their own length. Vectors here are unit vectors, so the length that rounding to a grid
of 127 steps needs carries no information: no scale is stored, the decoded vector is a unit vector again and its product with a
unit query is a true cosine. The codes of a vector depend on that vector alone. Scales per dimension, the alternative, are
learnt from a whole catalogue: one new item would change everybody's codes, an evaluation that rebuilds its vectors day by day
would differ from a night that keeps yesterday's, and an item that comes by day would have no scale of its own.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

Codes = Literal["float32", "float16", "int8"]
CODES: tuple[Codes, ...] = get_args(Codes)
STEPS = 127

Vectors = npt.NDArray[np.float32]


class CodesError(BrewlineError):
    """Vectors cannot be kept in these codes, or the name of the codes is unknown."""


def codes_named(name: str) -> Codes:
    """The codes of this name are returned. Raises CodesError, which lists those that exist."""
    for known in CODES:
        if name == known:
            return known
    raise CodesError(f"vectors cannot be kept as {name!r}: expected one of {', '.join(CODES)}")


def encode_rows(vectors: npt.NDArray[Any], codes: Codes) -> npt.NDArray[Any]:
    """The vectors [N, D] in these codes are returned, little-endian; coding what was decoded gives the same codes again.

    Raises CodesError for int8 codes of a row that is all zero or holds NaN or infinity.
    """
    with np.errstate(over="ignore"):
        plain: Vectors = np.ascontiguousarray(vectors, dtype="<f4")
        if codes == "float32":
            return plain
        if codes == "float16":
            return plain.astype("<f2")
    largest = np.abs(plain).max(axis=1, initial=0.0, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if bad.size:
        raise CodesError(f"vector {bad[0]} is all zero, NaN or infinite ({bad.size} are): it has no int8 codes; encode it again")
    return np.rint(plain / largest * STEPS).astype(np.int8)


def decode_rows(coded: npt.NDArray[Any], codes: Codes) -> Vectors:
    """The float32 vectors [N, D] that stand for the codes are returned; float32 codes are returned as they are."""
    if codes == "float32":
        return coded
    plain: Vectors = np.asarray(coded, np.float32)
    if codes == "int8":
        plain /= np.sqrt(np.einsum("nd,nd->n", plain, plain))[:, None]
    return plain


def rounded(vectors: npt.NDArray[Any], codes: Codes) -> Vectors:
    """What is left of the vectors [N, D] after a stay in these codes is returned: what an index over them is made of."""
    return decode_rows(encode_rows(vectors, codes), codes)

"""iALS (Hu, Koren, Volinsky 2008) by the library `implicit`, members folded in from their history at the query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieval.evidence.baselines import Floats, Knowledge, Past, history_matrix
from retrieval.evidence.protocol import EvidenceError, Queries
from retrieval.evidence.rank import Scorer


@dataclass(frozen=True)
class Ials:
    """Factors of members and items; deterministic: one thread, one seed; conjugate gradients, the default of the library."""

    penalty: float = 10.0
    alpha: float = 20.0
    factors: int = 64
    iterations: int = 15
    seed: int = 0
    name: str = "iALS"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"factors={self.factors} reg={self.penalty:g} alpha={self.alpha:g}"

    def fit(self, past: Past) -> Scorer:
        """Returns a scorer. Raises EvidenceError without the library."""
        try:
            from implicit.cpu.als import AlternatingLeastSquares
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
        except ImportError as error:
            raise EvidenceError(
                "iALS needs the library implicit: pip install 'brewline[evaluate]', or leave it out with --without ials."
            ) from error
        items = len(past.dataset.items)
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.penalty,
                alpha=self.alpha,
                iterations=self.iterations,
                num_threads=1,
                random_state=self.seed,
            )
            model.fit(past.matrix, show_progress=False)

        def score(queries: Queries) -> Floats:
            history = history_matrix(queries, items)
            history.data[:] = 1
            with threadpool_limits(1, "blas"):
                members = model.recalculate_user(np.arange(len(queries)), history)
            return np.asarray(members @ model.item_factors.T, np.float32)

        return score

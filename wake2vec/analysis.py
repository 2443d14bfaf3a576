"""The geometry of a table of rows: norms, directions, dimension, drift, neighbours.

A table is anything with `shape` (rows, D) whose `table[a:b]` gives those rows: a tensor on any device, or a matrix in a
file (`tables.StoredTable`). It is read a slice at a time, so that its size does not decide the memory.

Shapes: N rows of a table, D their length, S rows of one slice, n sampled rows, Q query rows, K neighbours.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

SLICE_ROWS = 4096
_Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution
_TINY = 1e-12


class Table(Protocol):
    """Rows that are read by slices."""

    @property
    def shape(self) -> Any:
        """Return (rows, D)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return rows a:b."""


def slices(table: Table) -> Iterator[tuple[int, Tensor]]:
    """Yield the table's rows as float32, a slice at a time, each with its first row's index."""
    for start in range(0, table.shape[0], SLICE_ROWS):
        yield start, table[start : start + SLICE_ROWS].float()


def sample_ids(num_rows: int, count: int, seed: int, stream: str) -> Tensor:
    """Return `count` different row indices in ascending order (all of them if there are no more); seeded by name."""
    digest = hashlib.sha256(f"wake2vec sample {seed} {stream}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(num_rows, generator=generator)[:count].sort().values


def take_rows(table: Table, ids: Tensor) -> Tensor:
    """Return the rows of ascending ids as float32 on the host, found in one pass over the table."""
    rows_nD = torch.empty(len(ids), table.shape[1])
    at = 0
    for start in range(0, table.shape[0], SLICE_ROWS):
        inside = ids[(ids >= start) & (ids < start + SLICE_ROWS)] - start
        if len(inside):
            rows_SD = table[start : start + SLICE_ROWS]
            rows_nD[at : at + len(inside)] = rows_SD[inside.to(rows_SD.device)]
            at += len(inside)
    return rows_nD


def row_norms(table: Table) -> Tensor:
    """Return the L2 norm of every row, float32 on the host."""
    norms_N = torch.empty(table.shape[0])  # results first: among the slices they would keep the heap from shrinking
    for start, rows_SD in slices(table):
        norms_N[start : start + len(rows_SD)] = torch.linalg.vector_norm(rows_SD, dim=1)
    return norms_N


def describe(values_N: Tensor) -> dict[str, float | int]:
    """Return count, mean, population standard deviation, extremes and quartiles."""
    values = values_N.double().numpy()
    quartiles = np.percentile(values, [25, 50, 75])
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "p25": float(quartiles[0]),
        "p50": float(quartiles[1]),
        "p75": float(quartiles[2]),
    }


def histogram_edges(values: Sequence[Tensor], bins: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return common edges over all values; of some width also where they are all the same."""
    low = min(float(v.min()) for v in values)
    high = max(float(v.max()) for v in values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def compare_norms(base_N: Tensor, new_N: Tensor) -> dict[str, Any]:
    """Return Welch's t with the 95 % interval of mean_base - mean_new, Mann-Whitney U and Cohen's d.

    Cohen's d = (mean_base - mean_new) / sqrt((sd_base^2 + sd_new^2) / 2), population standard deviations. What cannot
    be computed (fewer than two rows, no spread at all) is None.
    """
    base, new = base_N.double().numpy(), new_N.double().numpy()
    spread = math.sqrt((base.var() + new.var()) / 2)
    enough = min(len(base), len(new)) > 1 and spread > _TINY
    u = stats.mannwhitneyu(base, new)
    result: dict[str, Any] = {
        "cohens_d": float((base.mean() - new.mean()) / spread) if spread > _TINY else None,
        "welch_t": None,
        "mann_whitney_u": {"statistic": float(u.statistic), "p": float(u.pvalue)},
    }
    if enough:
        welch = stats.ttest_ind(base, new, equal_var=False)
        interval = welch.confidence_interval(0.95)
        result["welch_t"] = {
            "statistic": float(welch.statistic),
            "p": float(welch.pvalue),
            "df": float(welch.df),
            "mean_difference_ci95": [float(interval.low), float(interval.high)],
        }
    return result


def mean_interval(values_n: Tensor, population: int) -> list[float]:
    """Return the 95 % interval of a population's mean from a sample; of no width where the sample is all of it."""
    n = len(values_n)
    if n < 2:
        return [float(values_n.mean())] * 2
    half = _Z95 * float(values_n.double().std()) / math.sqrt(n) * math.sqrt(1 - n / population)
    mean = float(values_n.double().mean())
    return [mean - half, mean + half]


def unit_rows(rows_nD: Tensor, *, centre: bool = False) -> Tensor:
    """Return rows of length 1, about their mean if `centre`; a zero row stays zero."""
    if centre:
        rows_nD = rows_nD - rows_nD.mean(0)
    unit_nD: Tensor = rows_nD / torch.linalg.vector_norm(rows_nD, dim=1, keepdim=True).clamp(min=_TINY)
    return unit_nD


def isotropy(rows_nD: Tensor) -> float:
    """Return min Z / max Z with Z_i = sum_j exp(cos_ij), rows centred, the diagonal's cosine taken as 0.

    1 is perfectly even. It depends on n and D: even random directions stay below 1, hence `isotropy_baseline`.
    """
    unit_nD = unit_rows(rows_nD, centre=True)
    cosine_nn = (unit_nD @ unit_nD.T).fill_diagonal_(0)
    z_n = cosine_nn.exp_().sum(1)
    return float(z_n.min() / z_n.max())


def isotropy_baseline(num_rows: int, dim: int, seed: int, draws: int = 3) -> dict[str, Any]:
    """Return the isotropy of as many random directions, over several seeded draws."""
    generator = torch.Generator().manual_seed(seed)
    found = [isotropy(torch.randn(num_rows, dim, generator=generator)) for _ in range(draws)]
    return {"mean": float(np.mean(found)), "min": min(found), "max": max(found), "draws": draws}


@dataclass(frozen=True)
class Cosines:
    """Pairwise cosines of sampled rows: `values` of every pair, `mean` with its 95 % interval."""

    values: Tensor
    mean: float
    ci95: list[float]

    def as_json(self) -> dict[str, Any]:
        """Return the numbers without the values."""
        return {"mean": self.mean, "std": float(self.values.std(correction=0)), "ci95": self.ci95}


def cosines_within(rows_nD: Tensor, population: int) -> Cosines:
    """Return the cosines of all pairs of a sample.

    Pairs share rows, so the interval is the jackknife's over rows, not that of n^2 independent numbers.
    """
    unit_nD = unit_rows(rows_nD).double()
    n = len(unit_nD)
    upper = torch.triu_indices(n, n, 1)
    values = (unit_nD @ unit_nD.T)[upper[0], upper[1]].float()
    sum_D = unit_nD.sum(0)
    total = sum_D @ sum_D - n
    left_out_n = (total - 2 * (unit_nD @ sum_D - 1)) / ((n - 1) * (n - 2)) if n > 2 else torch.zeros(n)
    mean = float(total / (n * (n - 1)))
    half = _Z95 * math.sqrt(_jackknife_variance(left_out_n, population))
    return Cosines(values, mean, [mean - half, mean + half])


def cosines_between(a_nD: Tensor, b_nD: Tensor, populations: tuple[int, int]) -> Cosines:
    """Return the cosines between the rows of two samples, with the jackknife's interval over both."""
    unit_a, unit_b = unit_rows(a_nD).double(), unit_rows(b_nD).double()
    values = (unit_a @ unit_b.T).flatten().float()
    sum_a, sum_b = unit_a.sum(0), unit_b.sum(0)
    total = sum_a @ sum_b
    variance = 0.0
    for unit, other, population in ((unit_a, sum_b, populations[0]), (unit_b, sum_a, populations[1])):
        scale = (len(unit) - 1) * (len(unit_a) * len(unit_b) // len(unit))
        variance += _jackknife_variance((total - unit @ other) / max(1, scale), population)
    mean = float(total / (len(unit_a) * len(unit_b)))
    half = _Z95 * math.sqrt(variance)
    return Cosines(values, mean, [mean - half, mean + half])


def _jackknife_variance(left_out_n: Tensor, population: int) -> float:
    n = len(left_out_n)
    spread = float((left_out_n - left_out_n.mean()).square().sum())
    return (n - 1) / n * spread * max(0.0, 1 - n / population)


def kolmogorov_smirnov(a_nD: Tensor, b_nD: Tensor) -> dict[str, Any] | None:
    """Compare the cosines within two samples; on disjoint pairs of rows, which are independent of each other."""
    if min(len(a_nD), len(b_nD)) < 4:
        return None
    found = []
    for rows_nD in (a_nD, b_nD):
        unit_nD = unit_rows(rows_nD)
        half = len(unit_nD) // 2
        found.append((unit_nD[:half] * unit_nD[half : 2 * half]).sum(1).double().numpy())
    result = stats.ks_2samp(*found)
    return {"statistic": float(result.statistic), "p": float(result.pvalue), "pairs": [len(f) for f in found]}


def principal_variances(table: Table, ids: Tensor | None = None) -> Tensor:
    """Return the variances along all principal axes of some rows (or all), descending, float64 on the host.

    There are D of them, those past the number of rows zero: nothing caps the dimension that is read off them.
    """
    dim = table.shape[1]
    rows_nD = None
    if ids is not None and len(ids) < dim:
        rows_nD = take_rows(table, ids)
    elif ids is None and table.shape[0] < dim:
        rows_nD = table[0 : table.shape[0]].float().cpu()
    if rows_nD is not None:
        centred_nD = (rows_nD - rows_nD.mean(0)).double()
        small = torch.linalg.eigvalsh(centred_nD @ centred_nD.T / len(centred_nD))
        variances = torch.cat([torch.zeros(dim - len(small), dtype=torch.float64), small])
    else:
        variances = torch.linalg.eigvalsh(_covariance(table, ids))
    return variances.double().clamp(min=0).flip(0)


def _covariance(table: Table, ids: Tensor | None) -> Tensor:
    """Return the covariance DxD in float32, summed over slices about the first slice's mean against cancellation."""
    centre_D = sum_D = product_DD = None
    count = 0
    for start, rows_SD in slices(table):
        if ids is not None:
            inside = ids[(ids >= start) & (ids < start + SLICE_ROWS)] - start
            rows_SD = rows_SD[inside.to(rows_SD.device)]
        if not len(rows_SD):
            continue
        if centre_D is None or sum_D is None or product_DD is None:
            centre_D, sum_D = rows_SD.mean(0), torch.zeros_like(rows_SD[0])
            product_DD = rows_SD.new_zeros(rows_SD.shape[1], rows_SD.shape[1])
        rows_SD = rows_SD - centre_D
        sum_D += rows_SD.sum(0)
        product_DD.addmm_(rows_SD.T, rows_SD)
        count += len(rows_SD)
    assert sum_D is not None
    assert product_DD is not None
    mean_D = sum_D / count
    return (product_DD / count).sub_(mean_D.outer(mean_D)).cpu()


def dimension(variances_D: Tensor, num_rows: int) -> dict[str, Any]:
    """Return how many components hold 90 % and 95 % of the variance, and the participation ratio.

    `random` is what as many random directions give: less than D too, as a sample never spreads quite evenly.
    """
    dim = len(variances_D)
    total = float(variances_D.sum())
    ratio = total**2 / float(variances_D.square().sum()) if total > 0 else 0.0
    share_D = variances_D.cumsum(0) / max(total, _TINY)
    found: dict[str, Any] = {
        f"components_{percent}": min(dim, int((share_D < percent / 100).sum()) + 1) if total > 0 else 0
        for percent in (90, 95)
    }
    return {
        **found,
        "participation_ratio": ratio,
        "random": {
            "components_90": random_components(0.90, num_rows, dim),
            "components_95": random_components(0.95, num_rows, dim),
            "participation_ratio": dim / (1 + dim / num_rows),
        },
        "rows": num_rows,
        "dim": dim,
    }


def random_components(share: float, num_rows: int, dim: int) -> int:
    """Return how many components of random rows hold a share of their variance, by the Marchenko-Pastur law."""
    gamma = dim / num_rows
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2

    def tail(start: float, power: int) -> float:  # of the variances (power 1) or of their number (0) above `start`
        value, _ = integrate.quad(
            lambda x: math.sqrt(max(0.0, (high - x) * (x - low))) * x ** (power - 1) / (2 * math.pi * gamma),
            max(start, low, _TINY),
            high,
            limit=200,
        )
        return float(value)

    edge = optimize.brentq(lambda start: tail(start, 1) - share, max(low, _TINY), high)
    return max(1, round(tail(edge, 0) * dim))


def drift(start: Table, now: Table) -> tuple[Tensor, Tensor]:
    """Return each row's cosine with, and L2 distance from, where it started; float32 on the host."""
    cosines_N, distances_N = torch.empty(now.shape[0]), torch.empty(now.shape[0])
    for first, rows_SD in slices(now):
        chunk = slice(first, first + len(rows_SD))
        before_SD = start[chunk].float()
        cosines_N[chunk] = torch.cosine_similarity(before_SD, rows_SD, dim=1, eps=_TINY)
        distances_N[chunk] = torch.linalg.vector_norm(rows_SD - before_SD, dim=1)
    return cosines_N, distances_N


@torch.no_grad()
def nearest(
    queries_QD: Tensor, table: Table, k: int, *, exclude_self: bool = False, chunk_queries: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return ids_QK and cosines_QK of the k rows nearest to each query, nearest first; on the host.

    `exclude_self`: the queries are the table's own rows, and none is its own neighbour. Memory beside the arguments,
    on the queries' device: a slice of the table in float32 and chunk_queries * (D + SLICE_ROWS) floats.
    """
    num, device = len(queries_QD), queries_QD.device
    k = min(k, table.shape[0] - exclude_self)
    cosines_QK = torch.full((num, k), -torch.inf, device=device)
    ids_QK = torch.zeros((num, k), dtype=torch.int64, device=device)
    for start, rows_SD in slices(table):
        unit_SD = unit_rows(rows_SD.to(device))
        for first in range(0, num, chunk_queries):
            chunk = slice(first, first + chunk_queries)
            scores_CS = unit_rows(queries_QD[chunk].float()) @ unit_SD.T
            if exclude_self:
                own = torch.arange(first, first + len(scores_CS), device=device) - start
                inside = (own >= 0) & (own < len(unit_SD))
                scores_CS[inside.nonzero().squeeze(1), own[inside]] = -torch.inf
            best_CK, at_CK = scores_CS.topk(min(k, scores_CS.shape[1]), dim=1)
            merged = torch.cat([cosines_QK[chunk], best_CK], 1)
            merged_ids = torch.cat([ids_QK[chunk], at_CK + start], 1)
            cosines_QK[chunk], order_CK = merged.topk(k, dim=1)
            ids_QK[chunk] = merged_ids.gather(1, order_CK)
    return ids_QK.cpu(), cosines_QK.cpu()

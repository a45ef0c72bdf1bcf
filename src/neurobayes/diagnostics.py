"""Whether a sampling run can be trusted, judged on predictions first.

Weights of a network can be permuted without changing the function, so R-hat
of weights means little; R-hat and effective sample size of predicted values
and of the noise mean what they say. The formulas are those of ArviZ (Vehtari,
Gelman, Simpson, Carpenter & Bürkner 2021, "Rank-normalization, folding, and
localization", Bayesian Analysis 16, doi:10.1214/20-BA1221).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ._threads import filters_of_warnings

R_HAT_LIMIT = 1.05
MIN_ESS = 100.0
SATURATION_LIMIT = 0.1
PARETO_K_LIMIT = 0.7
"""Above, importance ratios of an approximation are too heavy-tailed for its moments to be relied on."""

E_BFMI_LIMIT = 0.3


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Summary of a sampling run.

    Attributes
    ----------
    r_hat : largest split R-hat over predicted values and noise; NaN where it cannot be judged.
    ess_bulk, ess_tail : smallest effective sample sizes over the same.
    ess_bulk_median : the median over predicted values.
    num_divergent : draws whose trajectory diverged.
    saturated : share of draws that used the whole tree depth.
    e_bfmi : smallest energy Bayesian fraction of missing information over chains.
    num_chains, num_draws : the run's size.
    ok : whether every figure is within its limit.
    verdict : one sentence: trust it or not, and what to change.
    """

    r_hat: float
    ess_bulk: float
    ess_tail: float
    ess_bulk_median: float
    num_divergent: int
    saturated: float
    e_bfmi: float
    num_chains: int
    num_draws: int
    ok: bool
    verdict: str

    def summary(self) -> dict[str, float]:
        """The figures as a plain dictionary."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("ok", "verdict")}

    def __str__(self) -> str:
        figures = ", ".join(f"{name}={value:.4g}" for name, value in self.summary().items())
        return f"{self.verdict}\n{figures}"


def combine(parts: Sequence[Diagnostics]) -> Diagnostics:
    """The verdict on several backbones, each with a sampler of its own: that on the worst of them."""
    if len(parts) == 1:
        return parts[0]
    worst = min(range(len(parts)), key=lambda k: (parts[k].ok, parts[k].ess_bulk))
    rest = "other backbone is" if len(parts) == 2 else f"other {len(parts) - 1} backbones are"
    verdict = f"{parts[worst].verdict} The {rest} no worse."
    if not parts[worst].ok:
        failed = sum(not part.ok for part in parts)
        verdict = f"{failed} of {len(parts)} backbones need attention. The worst: {parts[worst].verdict}"
    return dataclasses.replace(
        parts[worst],
        ess_bulk=sum(part.ess_bulk for part in parts),
        ess_tail=sum(part.ess_tail for part in parts),
        ess_bulk_median=sum(part.ess_bulk_median for part in parts),
        r_hat=float(np.fmax.reduce([part.r_hat for part in parts])),
        num_divergent=sum(part.num_divergent for part in parts),
        saturated=max(part.saturated for part in parts),
        e_bfmi=float(np.fmin.reduce([part.e_bfmi for part in parts])),
        num_chains=sum(part.num_chains for part in parts),
        num_draws=min(part.num_draws for part in parts),
        verdict=verdict,
    )


@dataclasses.dataclass(frozen=True)
class LeafDiagnostics:
    """How well the draws of one leaf's weights mix: the largest and median R-hat, the smallest and median ESS.

    Secondary: chains may disagree about weights that can be exchanged and agree about every prediction.
    """

    num_weights: int
    r_hat: float
    r_hat_median: float
    ess_bulk: float
    ess_bulk_median: float


def by_leaf(samples: Mapping[str, np.ndarray], *, independent: bool = False) -> dict[str, LeafDiagnostics]:
    """Diagnostics of draws ``(chain, draw, …)`` by name; ``independent`` as for ``diagnose``."""
    found = {}
    for name, values in samples.items():
        flat = values.reshape(*values.shape[:2], -1)
        if independent:
            r_hat, ess = np.ones(1), np.full(1, float(flat.shape[0] * flat.shape[1]))
        elif flat.shape[1] < 4:
            r_hat = ess = np.full(1, np.nan)
        else:
            r_hat, ess = split_r_hat(flat), effective_sample_size(flat)
        found[name] = LeafDiagnostics(
            flat.shape[-1], float(r_hat.max()), float(np.median(r_hat)), float(ess.min()), float(np.median(ess))
        )
    return found


def effective_sample_size(values: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective number of draws of each column; ``values`` is (chain, draw, quantity)."""
    from arviz_stats.base import array_stats

    prob = (0.05, 0.95) if method == "tail" else None
    with filters_of_warnings:  # stopping rules are judged in the threads of several samplers
        found = array_stats.ess(np.asarray(values, float), chain_axis=0, draw_axis=1, method=method, prob=prob)
    return np.asarray(found)


def split_r_hat(values: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of each column; ``values`` is (chain, draw, quantity). One chain is halved."""
    from arviz_stats.base import array_stats

    if len(values) == 1:
        half = values.shape[1] // 2
        values = np.concatenate([values[:, :half], values[:, half : 2 * half]])
    with filters_of_warnings, np.errstate(divide="ignore", invalid="ignore"):  # chains that never move
        return np.asarray(array_stats.rhat(np.asarray(values, float), chain_axis=0, draw_axis=1))


def energy_fraction(energy: np.ndarray) -> float:
    """Smallest E-BFMI over chains (Betancourt 2016, arXiv:1604.00695); ``energy`` is (chain, draw)."""
    change = np.diff(energy, axis=1)
    spread = energy.var(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = (change**2).mean(axis=1) / spread
    return float(np.min(fraction)) if np.all(np.isfinite(fraction)) else float("nan")


def diagnose(
    quantities: np.ndarray,
    stats: dict[str, np.ndarray],
    max_tree_depth: int,
    *,
    independent: bool = False,
    approximation: str = "",
    num_backbones: int = 1,
    pareto_k: float = float("nan"),
) -> Diagnostics:
    """Judge a run from draws of predicted values and noise, ``(chain, draw, quantity)``, and sampler reports.

    ``independent`` draws need no convergence: their R-hat is one and their effective number is their number. They
    are of the exact posterior, or of the ``approximation`` of that name, whose importance ratios may have been judged
    by ``pareto_k``. Several backbones share the effective draws that one would need.
    """
    figures = _figures(quantities, stats, max_tree_depth, independent=independent)
    complaints = _complaints(figures, MIN_ESS / num_backbones)
    if not np.all(np.isfinite(quantities)):
        problem = "some predictions or noise levels are not finite in some draws"
        complaints.insert(0, (problem, "lower priors_sigma, or standardise the inputs (standardize=True)"))
    if pareto_k > PARETO_K_LIMIT:
        problem = f"the {approximation} approximation is far from the posterior (Pareto k {pareto_k:.2f})"
        complaints.insert(0, (problem, "use engine='nuts'"))
    if independent and not complaints:
        verdict = _praise(figures["num_chains"] * figures["num_draws"], approximation, pareto_k)
    else:
        verdict = _sentence(complaints, figures)
    return Diagnostics(**figures, ok=not complaints, verdict=verdict)


def _figures(quantities: np.ndarray, stats: dict[str, np.ndarray], max_tree_depth: int, *, independent: bool) -> dict:
    """What ``Diagnostics`` reports of a run."""
    num_chains, num_draws = quantities.shape[:2]
    finite = quantities[..., np.all(np.isfinite(quantities), axis=(0, 1))]
    varying = finite[..., np.ptp(finite, axis=(0, 1)) > 0]
    if num_draws < 4 or varying.shape[-1] == 0:
        r_hat = bulk = tail = np.array([np.nan])
    elif independent:
        r_hat, bulk = np.ones(1), np.full(1, float(num_chains * num_draws))
        tail = bulk
    else:
        r_hat = split_r_hat(varying)
        bulk, tail = effective_sample_size(varying, "bulk"), effective_sample_size(varying, "tail")
    steps = stats.get("num_steps")
    return {
        "r_hat": float(np.max(r_hat)),
        "ess_bulk": float(np.min(bulk)),
        "ess_tail": float(np.min(tail)),
        "ess_bulk_median": float(np.median(bulk)),
        "num_divergent": int(np.sum(stats.get("diverging", np.zeros((1, 1), bool)))),
        "saturated": float(np.mean(steps >= 2**max_tree_depth - 1)) if steps is not None else 0.0,
        "e_bfmi": energy_fraction(stats["energy"]) if "energy" in stats and num_draws > 2 else float("nan"),
        "num_chains": num_chains,
        "num_draws": num_draws,
    }


def _praise(total: int, approximation: str, pareto_k: float) -> str:
    """The verdict on independent draws without a complaint."""
    if not approximation:
        return f"The draws can be trusted: all {total} are independent draws of the exact posterior."
    if pareto_k <= PARETO_K_LIMIT:
        return (
            f"All {total} are independent draws of a {approximation} approximation, which is close to the posterior "
            f"(Pareto k {pareto_k:.2f}, at most {PARETO_K_LIMIT})."
        )
    return (
        f"All {total} are independent draws of a {approximation} approximation, whose distance from the posterior "
        "they do not show: compare with engine='nuts' where it matters."
    )


def _complaints(f: dict, min_ess: float) -> list[tuple[str, str]]:
    """What is wrong, each with its remedy, the gravest first."""
    found = []
    total = f["num_chains"] * f["num_draws"]
    if np.isnan(f["ess_bulk"]):
        found.append(("the draws do not vary or are fewer than four", "draw more samples (num_samples)"))
    if f["num_divergent"] > max(1, 0.001 * total):
        found.append(
            (
                f"{f['num_divergent']} of {total} trajectories diverged",
                "raise target_accept, lower priors_sigma, or make fewer weights Bayesian",
            )
        )
    if f["r_hat"] > R_HAT_LIMIT:
        found.append((f"R-hat of the predictions reaches {f['r_hat']:.2f}", "raise num_warmup and num_samples"))
    if f["ess_bulk"] < min_ess:
        found.append((f"some prediction has only {f['ess_bulk']:.0f} effective draws", "raise num_samples"))
    if f["saturated"] > SATURATION_LIMIT:
        found.append(
            (
                f"{100 * f['saturated']:.0f} % of the draws used the whole tree depth",
                "raise num_warmup or make fewer weights Bayesian",
            )
        )
    if f["e_bfmi"] < E_BFMI_LIMIT:
        found.append((f"E-BFMI is {f['e_bfmi']:.2f}", "give the noise a prior that keeps it from zero"))
    return found


def _sentence(complaints: list[tuple[str, str]], f: dict) -> str:
    if not complaints:
        chains = "" if f["num_chains"] > 1 else " (one chain: num_chains=4 would compare independent runs)"
        divergences = "1 divergence" if f["num_divergent"] == 1 else f"{f['num_divergent']} divergences"
        return (
            f"The draws can be trusted: R-hat {f['r_hat']:.3f}, at least {f['ess_bulk']:.0f} effective draws of every "
            f"prediction, {divergences}{chains}."
        )
    problems = "; ".join(problem for problem, _ in complaints)
    wanted = list(dict.fromkeys(remedy for _, remedy in complaints))
    if "raise num_warmup and num_samples" in wanted:  # says the same and more
        wanted = [remedy for remedy in wanted if remedy != "raise num_samples"]
    remedies = "; ".join(wanted)
    return f"Do not trust these draws yet: {problems}. To mend it: {remedies}."

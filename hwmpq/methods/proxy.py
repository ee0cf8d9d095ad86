"""The hyperparameters of a plan's numbers, searched on a cheap proxy of its true loss.

Proxy: the root of KL(float ‖ rounded) on a few held-out images, in chunks. In the loss, and in KL
itself, the few images whose class is in doubt drown the settings' differences; the squared error of
the logits also counts what no class depends on. (ResNet-20 in w4a4, 39 settings: rank correlation
of 64 images with cross entropy on 704 others: root 0.66, squared error 0.52, cross entropy 0.44;
one half of all 768 with the other half in cross entropy: 0.64.) A setting that does badly on the
first ones is given up (Optuna's median pruner; settings are proposed by its tree-structured Parzen
estimator, Bergstra et al., NeurIPS 2011), so what ranks settings is their value relative to the
default's on the same images.
The best few by the proxy, the default and some of the others are then judged by the loss on all
held-out images, and the best of those is taken; so the result is never worse than the default
there, and the proxy's rank correlation with the full judgement is known.

Settings are proposed a few at a time, which the workers of --executor judge side by side. Each
judged chunk is kept in the store, and the sampler is seeded: a run that was interrupted goes
through the same trials again, but pays only for those it had not finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from scipy import stats

from hwmpq.methods.elsewhere import holders
from hwmpq.methods.study import Judged, Setting, Study
from hwmpq.quantize.ptq import OF_MENU
from hwmpq.quantize.ranges import Method as Ranges
from hwmpq.quantize.scores import LOSSES
from hwmpq.types import Assignment

if TYPE_CHECKING:
    import optuna
    from torch import Tensor

    from hwmpq.methods.elsewhere import Holders
    from hwmpq.quantize.scores import Batch

#: Settings that the proxy judges, chunks of it, and images of a chunk.
SETTINGS, CHUNKS, CHUNK = 36, 4, 16
#: Settings that are proposed together, whoever judges them: workers find what one process finds.
WAVE = 4
#: The proxy's loss, as `--loss` names it.
LOSS = "hwmpq.methods.proxy:root_divergence"
#: Trials at most, as one may propose a setting again; that one costs nothing.
TRIALS = 4 * SETTINGS
#: Settings that are judged in full: the best by the proxy, and others spread over the rest.
BEST, SPREAD = 3, 3


def search(study: Study, plan: Assignment) -> tuple[Setting, dict[str, Any]]:
    """The best setting found for a plan, and how the search went."""
    with holders(study.job, study.facts.images.holdout) as helpers:
        found = trials(study, plan, helpers)
        scores = relative(found)
        whole = {s: score for s, score in scores.items() if len(found[s]) == _chunks(study)}
        picked = _picked(whole)
        full = dict(zip(picked, study.judge_all(plan, picked, helpers=helpers), strict=True))
    best = min(full, key=lambda s: full[s].loss)
    return best, _report(found, scores, full)


def trials(
    study: Study, plan: Assignment, helpers: Holders | None = None
) -> dict[Setting, list[Judged]]:
    """Setting -> the chunks it was judged on, fewer where it was given up; the default first."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=study.job.options.seed, n_startup_trials=8, constant_liar=True
    )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=WAVE)
    tuned = optuna.create_study(sampler=sampler, pruner=pruner)
    usual = Setting()
    tuned.enqueue_trial(
        {"ranges": usual.ranges, "search": usual.search}
        | {step: step in usual.steps for step in OF_MENU}
    )
    found: dict[Setting, list[Judged]] = {}
    asked = 0
    with study.job.progress.stage("proxy search", SETTINGS) as advance:
        while len(found) < SETTINGS and asked < TRIALS and (not found or study.time_for()):
            wave = [tuned.ask() for _ in range(min(WAVE, SETTINGS - len(found)))]
            asked += len(wave)
            before = len(found)
            for trial, value in _judged(study, plan, wave, found, helpers):
                state = TrialState.PRUNED if value is None else TrialState.COMPLETE
                tuned.tell(trial, value, state)
            advance(len(found) - before)
    return found


def _judged(
    study: Study, plan: Assignment, wave: Sequence[optuna.Trial],
    found: dict[Setting, list[Judged]], helpers: Holders | None,
) -> Iterator[tuple[optuna.Trial, float | None]]:  # fmt: skip
    """Trials with their settings' proxies, chunk by chunk side by side; None where given up."""
    left = {trial: suggested(trial) for trial in wave}
    for k in range(_chunks(study)):
        settings = dict.fromkeys(left.values())
        new = [s for s in settings if len(found.setdefault(s, [])) == k]
        part = k * CHUNK, (k + 1) * CHUNK
        judged = study.judge_all(plan, new, *part, LOSS, helpers)
        for setting, chunk in zip(new, judged, strict=True):
            found[setting].append(chunk)
        for trial, setting in list(left.items()):
            trial.report(_mean(found[setting][: k + 1]), k)
            if trial.should_prune():
                del left[trial]
                yield trial, None
    for trial, setting in left.items():
        yield trial, _mean(found[setting])


def relative(found: Mapping[Setting, Sequence[Judged]]) -> dict[Setting, float]:
    """The proxy of each setting, as a part of the default's on the same images."""
    usual = found[Setting()]
    return {s: _mean(chunks) / (_mean(usual[: len(chunks)]) or 1.0) for s, chunks in found.items()}


def root_divergence(outputs: Tensor, batch: Batch) -> Tensor:
    """√KL(float ‖ outputs) of each sample, [N]; rounding may leave KL just below 0."""
    return LOSSES["kl"](outputs, batch).clamp_min(0).sqrt()


def suggested(trial: optuna.Trial) -> Setting:
    """The percentile matters, and is asked for, only where the ranges are cut at one."""
    ranges: Ranges = trial.suggest_categorical("ranges", get_args(Ranges))
    searched = trial.suggest_categorical("search", [True, False])
    steps = tuple(step for step in OF_MENU if trial.suggest_categorical(step, [True, False]))
    if ranges != "percentile":
        return Setting(ranges, search=searched, steps=steps)
    outside = trial.suggest_float("outside", 1e-3, 1.0, log=True)
    return Setting(ranges, round(100 - outside, 4), searched, steps)


def _chunks(study: Study) -> int:
    """Whole chunks that the held-out images give, one at least."""
    return max(1, min(CHUNKS, study.images // CHUNK))


def _mean(chunks: Sequence[Judged]) -> float:
    return float(np.average([c.loss for c in chunks], weights=[c.images for c in chunks]))


def _picked(scores: Mapping[Setting, float]) -> list[Setting]:
    """The default, the best ones, and some spread evenly over the rest."""
    order = sorted(scores, key=lambda s: scores[s])
    rest = order[BEST:]
    spread = [rest[int(i)] for i in np.linspace(0, len(rest) - 1, min(SPREAD, len(rest)))]
    return list(dict.fromkeys([Setting(), *order[:BEST], *spread]))


def _report(
    found: Mapping[Setting, list[Judged]], scores: Mapping[Setting, float],
    full: Mapping[Setting, Judged],
) -> dict[str, Any]:  # fmt: skip
    """Rank correlation of proxy and full judgement; the cost of the search beside the same search
    in full, whose seconds are those of the full judgements made, scaled to all settings.

    Correlations are None where fewer than three settings, or equal ones, give no rank.
    """
    ours, truth = [scores[s] for s in full], [judged.loss for judged in full.values()]
    ranked = len(full) > 2 and np.ptp(ours) > 0 and np.ptp(truth) > 0
    chunks = [chunk for each in found.values() for chunk in each]
    images = sum(c.images for c in chunks)
    seconds = sum(c.seconds for c in chunks)
    each = next(iter(full.values())).images
    mean = float(np.mean([judged.seconds for judged in full.values()]))
    return {
        "settings": len(found), "judged_in_full": len(full),
        "spearman": float(stats.spearmanr(ours, truth).statistic) if ranked else None,
        "kendall": float(stats.kendalltau(ours, truth).statistic) if ranked else None,
        "seconds": seconds, "image_passes": images,
        "full_search_seconds": mean * len(found), "full_search_image_passes": each * len(found),
    }  # fmt: skip

"""Is the proxy of `lcpaq` a good judge, and how much does it save?

    python tools/bench/proxy.py zoo:resnet20_cifar --weights W.safetensors --data npz:cifar.npz \
        --format w4a4 [--settings 36] [--images 2000] [--store FILE]

Judges the same settings of one plan by the proxy and in full; prints the rank correlations, what
each search cost, and how the proxy's choice does beside the best one in full. Every judgement is
kept in the store: started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import record
from scipy import stats

from hwmpq import methods
from hwmpq.methods import proxy
from hwmpq.methods.study import Setting, Study
from hwmpq.stages.facts import Facts, calibrate
from hwmpq.stages.job import Images, Job, Options, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import make_menu, uniform
from hwmpq.stages.verify import float_logits, simulated
from hwmpq.types import Assignment, Sensitivity


def main() -> None:
    words = arguments()
    options = Options(
        words.model, weights=words.weights, data=words.data, calib=words.calib, seed=words.seed,
        formats=("fp32", words.format), method="lcpaq", store=words.store,
    )  # fmt: skip
    proxy.SETTINGS = words.settings
    job = open_job(methods.settle(options), Silent())
    with job.store:
        images = load_images(job)
        picked = np.arange(min(words.images, len(images.test)))
        images = replace(images, holdout=images.test.subset(picked))
        study, plan = opened(job, images)
        told = measured(job, images, study, plan)
    print(json.dumps(told))
    record.write(words.json, record.quantities(told))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--format", default="w4a4", help="of every layer that can take it")
    parser.add_argument("--settings", type=int, default=36)
    parser.add_argument("--images", type=int, default=2000, help="of a full judgement")
    parser.add_argument("--calib", type=int, default=256)
    parser.add_argument("--store")
    parser.add_argument("--seed", type=int, default=0)
    record.option(parser)
    return parser.parse_args()


def opened(job: Job, images: Images) -> tuple[Study, Assignment]:
    """The study of a uniform plan; no time and no loss is estimated."""
    menu = make_menu(job.network, job.target, job.options.formats)
    plan, _ = uniform(menu, job.network, job.options.formats[1])
    none = Sensitivity(job.network.names, menu.formats, np.zeros(menu.legal.shape), "none", 0)
    facts = Facts(images, menu, calibrate(job, images, menu), none, LatencyFacts({}, {}))
    return Study(replace(job, options=replace(job.options, max_time=1e9)), facts), plan


def measured(job: Job, images: Images, study: Study, plan: Assignment) -> dict[str, object]:
    """Both judgements of every setting, their agreement and their cost."""
    found = proxy.trials(study, plan)
    ours = proxy.relative(found)
    whole = {s: chunks for s, chunks in found.items() if len(chunks) == proxy.CHUNKS}
    truth = {}
    for setting in found:
        truth[setting] = study.judge(plan, setting)
        print(f"{len(truth)}/{len(found)} {asdict(setting)}: {ours[setting]:.4f} "
              f"{truth[setting].loss:.4f}", flush=True)  # fmt: skip
    reference = float_logits(job, images.holdout, "held-out images")

    def top1(setting: Setting) -> float:
        numbers = study.quantizers(setting, plan)
        return simulated(job, plan, numbers, images.holdout, reference).simulated

    chosen = min(whole, key=lambda s: ours[s])
    best = min(truth, key=lambda s: truth[s].loss)
    chunks = [chunk for each in found.values() for chunk in each]
    passes = sum(c.images for c in chunks), sum(t.images for t in truth.values())
    seconds = sum(c.seconds for c in chunks), sum(t.seconds for t in truth.values())
    return {
        "settings": len(found), "not given up": len(whole), "images": len(images.holdout),
        "spearman": correlation(stats.spearmanr, ours, truth, list(found)),
        "spearman of those not given up": correlation(stats.spearmanr, ours, truth, list(whole)),
        "kendall": correlation(stats.kendalltau, ours, truth, list(found)),
        "image passes": passes, "passes saved": passes[1] / passes[0],
        "seconds": seconds, "seconds saved": seconds[1] / seconds[0],
        "top-1": {"default": top1(Setting()), "by proxy": top1(chosen), "in full": top1(best)},
    }  # fmt: skip


def correlation(of, ours, truth, settings) -> float:
    return float(of([ours[s] for s in settings], [truth[s].loss for s in settings]).statistic)


if __name__ == "__main__":
    main()

"""Every performance figure of the project, each beside its peer in one run.

    python bench.py preprocess        python bench.py attention
"""
import argparse
import statistics
import time


def bench_evaluate(arguments):
    """1,000 patient resamples of CT-RATE's validation set beside the same by scikit-learn, and whether the intervals hold the truth."""
    import numpy as np
    from sklearn import metrics as sk

    import evaluate
    rng = np.random.default_rng(0)
    patients = np.r_[np.arange(1304), rng.integers(1304, size=3039 - 1304)]
    labels = (rng.random((3039, 18)) < rng.uniform(0.03, 0.45, 18)).astype(float)
    scores, thresholds = rng.normal(size=labels.shape) + labels, np.full(18, 0.5)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        evaluate.bootstrap(scores, labels, patients, thresholds)
        times.append(time.perf_counter() - start)
    ours = sorted(times)[2]
    start, peer_resamples = time.perf_counter(), 10
    for _ in range(peer_resamples):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(1304, size=1304)])
        for y, s in zip(labels[rows].T, scores[rows].T):
            predicted = s > 0.5
            for metric in (sk.roc_auc_score, sk.average_precision_score):
                metric(y, s)
            for metric in (sk.f1_score, sk.accuracy_score, sk.precision_score, sk.recall_score):
                metric(y, predicted)
    peer = (time.perf_counter() - start) * 1000 / peer_resamples
    print(f"1,000 patient resamples, 3,039 volumes x 18 classes, 8 metrics: {ours:.3f} s; scikit-learn's loop, 6 metrics: {peer:.1f} s, "
          f"measured on {peer_resamples}; ratio {peer / ours:.0f}")

    truth, sets, held = 0.8, arguments.sets, {"patients": 0, "volumes": 0}
    shift = statistics.NormalDist().inv_cdf(truth) * 2 ** 0.5                    # AUROC of two unit normals that lie `shift` apart
    for _ in range(sets):
        groups = np.repeat(np.arange(300), rng.integers(1, 4, 300))                               # one to three volumes a patient
        y = (rng.random(300) < 0.3)[groups].astype(float)
        s = shift * y + 0.8 ** 0.5 * rng.normal(size=300)[groups] + 0.2 ** 0.5 * rng.normal(size=len(groups))
        for unit, index in (("patients", groups), ("volumes", np.arange(len(groups)))):
            low, high = evaluate.interval(evaluate.bootstrap(s[:, None], y[:, None], index, [0.0])["auroc"])[:, 0]
            held[unit] += low <= truth <= high
    for unit, count in held.items():
        print(f"the 95 % bootstrap interval over {unit} holds the true AUROC {truth} in {100 * count / sets:.1f} % of {sets} simulated data sets")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("evaluate", help="patient bootstrap: speed beside scikit-learn, and coverage of its intervals")
    command.add_argument("--sets", type=int, default=1000, help="simulated data sets for the coverage")
    command.set_defaults(run=bench_evaluate)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

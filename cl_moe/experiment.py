"""READ FIRST: one experiment, the loop over experiences."""

from __future__ import annotations

from cl_moe.evaluation import evaluate, rewind
from cl_moe.foresight import census_of, deciding, record_shock, tell_decision
from cl_moe.growth.together import adapt
from cl_moe.plasticity import observe
from cl_moe.reading import read
from cl_moe.run import Run
from cl_moe.stream import Experience


def run_experiment(run: Run) -> float:
    """Train a learner on a stream, one experience after the other; measure after each; return the objective.

    Row i of the accuracy matrix is measured after i experiences, row 0 before any training. A boundary is
    recorded, saved, and only then sent to the tracker, and so are moments inside an experience: killed at any
    time, a run goes on from what was saved last, ends with the same bits, and no point is missing or doubled.
    """
    with run.open():
        run.resume()
        if run.boundary < 0:
            measure(run)
        for experience in run.training_stream[run.boundary :]:
            run.progress.open(experience.index, run.learner.batches if run.inside else 0)
            if run.is_due(experience):
                if not run.inside:
                    grow_and_freeze(run, experience)
                fit(run, experience)
            measure(run)
        return run.finish()


def grow_and_freeze(run: Run, experience: Experience) -> None:
    """Adapt the model to what comes, as schedule and policy decide; measure the shock (of upcycling, too)."""
    learner, seen = run.learner, run.stream[: experience.index]
    with learner.charges.account("train"), learner.charges.counting():
        census = census_of(run, experience)
        learner.ledger += adapt(learner.model, census, *deciding(run, experience))
    if tell_decision(run, experience):
        with learner.charges.account("diagnostics"):
            record_shock(run, evaluate(run.trainer, learner, seen, run.spec.eval_batch_size))


def fit(run: Run, experience: Experience) -> None:
    """Train on one experience with the Trainer of the whole stream, so that its step axis never restarts."""
    with run.fitting(experience) as batches:
        run.trainer.fit(run.learner, train_dataloaders=batches)


def measure(run: Run) -> None:
    """Measure a row of the accuracy matrix on every experience's test data, and why old ones fell."""
    both, size, samples = (run.trainer, run.learner), run.spec.eval_batch_size, run.measuring.samples
    found = evaluate(*both, run.stream.measured(run.boundary + 1), size, samples, run.newest)
    if run.measuring.decomposes(run.boundary + 1, run.stream.end(run.boundary + 1)):
        found = found._replace(rewound=rewind(*both, run.stream[: run.boundary], size, run.past, found.row))
    beside = observe(*both, run.newest, samples, size, found.seen)
    run.close_boundary(found._replace(beside=beside | read(*both, run.stream, found.row, size)))

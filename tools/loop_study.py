"""Studies of the loop with simulated people: what rounds, answers and questions are worth, and whose taste
it learns.

    python -m tools.loop_study rounds --init_from out/reviews/sft --out study     rounds, beside learning once
    python -m tools.loop_study answers --init_from out/reviews/sft --out study    how many answers, and which
    python -m tools.loop_study taste --init_from out/reviews/sft --out study      two persons of opposite taste
    python -m tools.loop_study rounds --init_from s{seed}/reviews/sft --out study -- --ppo.updates 20

With {seed} in it, --init_from names another SFT for each seed. Words behind -- go to `train.py loop`.

Each prints a table and writes OUT/<study>.json and, with matplotlib (an extra), OUT/<study>.png; started
again, it goes on where it stopped.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import evaluate
from data.batches import held_out_prompts
from model import load_checkpoint
from runtime.draws import torch_seed
from runtime.machine import Interrupt
from runtime.options import Options, UserError, option, parse, run_main
from runtime.statistics import mean_interval
from runtime.storage import replace_text
from runtime.tables import table, to_json
from serve import loop
from serve.annotators import PERSONS, FunctionAnnotator
from serve.pairs import Card
from serve.rounds import Round, ask
from serve.sources import Sampled, reward_scorer

JUDGE = ("--annotator", "judge")


@dataclasses.dataclass
class StudyOptions(Options):
    """`python -m tools.loop_study rounds|answers|taste`"""

    init_from: str = option("out/reviews/sft", "the policy that loops start from, its judges beside it; {seed} in it "
                                              "stands for the seed's number")
    out: str = option("out-study", "folder for all loops of the studies")
    seeds: str = option("0,1,2", "of the loops")
    rounds: int = option(3, "of the loops in the studies of rounds and of taste", low=1)
    pairs: int = option(0, "of a round; 0: 400 in the study of rounds, 300 in all rounds for taste", low=0)
    error_rate: float = option(0.2, "of the judge's answers", low=0, high=1)
    sizes: str = option("100,300,1000,3000", "answers in all, in the study of answers")
    test_pairs: int = option(500, "pairs of SFT's replies to held-out prompts, which tell how right a reward model is",
                             low=10)
    traceback: bool = option(False, "show where in the code an error arose")


def numbers(text: str) -> list[int]:
    """The rising numbers of a list with commas; UserError if it is none."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or found != sorted({*found}):
        raise UserError(f"{text!r}: write rising whole numbers with commas between them")
    return found


def words(o: StudyOptions, out: pathlib.Path, seed: int, more: Sequence[Any]) -> list[str]:
    """The words of a loop."""
    return [*map(str, ("--init_from", sft(o, seed), "--out", out, "--seed", seed, *more))]


def sft(o: StudyOptions, seed: int) -> str:
    """The policy that the loops of this seed start from."""
    return o.init_from.replace("{seed}", str(seed))


def spread(values: Sequence[float]) -> str:
    """The mean over seeds, with lowest and highest."""
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def loop_folder(out: pathlib.Path) -> pathlib.Path:
    """Where the loop under this --out is; it is the only one there."""
    return next(out.glob("*/loop"))


# ---- rounds ------------------------------------------------------------------------------------------

def study_rounds(o: StudyOptions, more: list[str]) -> list[dict[str, Any]]:
    """Rounds of `pairs` answers each, beside one round of all of them."""
    found: dict[str, list[dict]] = {}
    k = o.pairs or 400
    for seed in numbers(o.seeds):
        for name, n_rounds, pairs in (("rounds", o.rounds, k), ("once", 1, o.rounds * k)):
            out = pathlib.Path(o.out) / "rounds" / f"{name}-{seed}"
            loop.main(words(o, out, seed, (*JUDGE, "--error_rate", o.error_rate, "--rounds", n_rounds, "--pairs", pairs,
                                           *more)))
            for row in json.loads((loop_folder(out) / "loop.json").read_text(encoding="utf-8"))["rounds"]:
                found.setdefault(f"round {row['round']}" if name == "rounds" else "once", []).append(row)
    # How right the reward models are is left out: each round holds out other answers, about other policies.
    keys = [key for key in found["once"][0] if key not in ("round", "answers", "accuracy_before", "accuracy_after")]
    rows = []
    for name, of_seeds in found.items():
        values = {key: [row[key][0] if isinstance(row[key], list) else row[key] for row in of_seeds] for key in keys}
        rows.append({"name": name, "answers": of_seeds[0]["answers"], "seeds": len(of_seeds),
                     **{key: spread(of_key) for key, of_key in values.items() if None not in of_key},
                     "of seeds": values})
    return rows


# ---- answers -----------------------------------------------------------------------------------------

class Growing(loop.Loop):
    """Rounds without PPO, in which SFT is asked about until there are so many answers in all."""

    sizes: Sequence[int] = ()
    test: Sequence[Card] = ()

    def gather(self, round: Round, before: Round | None) -> None:
        self.o = self.o.replace(pairs=self.sizes[round.number - 1] - ([0, *self.sizes])[round.number - 1])
        super().gather(round, before)

    def writer(self, path: pathlib.Path, name: str) -> Any:
        return super().writer(self.sft, "sft")

    def improve(self, round: Round) -> None:
        """SFT stays the policy."""

    def stage_options(self) -> dict[str, Any]:
        return super().stage_options() | {"study": {"sizes": list(self.sizes), "test_pairs": len(self.test)}}

    def write_summary(self, identity: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Only whose folder it is: there is no policy to tell of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "loop.json", to_json({"options": identity, "rounds": []}))
        return []

    def tell(self, round: Round, earlier: Sequence[Round], counts: dict[str, int]) -> None:
        """How often the reward model prefers what the annotator prefers when it makes no error."""
        score, _ = reward_scorer(str(round.path("reward")), self.o.device, self.data.template)
        prompts = [card.prompt for card in self.test]
        first, second = (score(prompts, [card.replies[i] for card in self.test]) for i in (0, 1))
        truth = self.annotator.deltas(self.test)
        accuracy, low, high = mean_interval(((first - second) * truth > 0)[truth != 0])
        replace_text(round.path("report.json"), to_json(
            {"answers": self.sizes[round.number - 1], **counts, "accuracy": accuracy, "interval": [low, high]}))

    def run(self) -> list[dict[str, Any]]:
        """The reports, one a size."""
        self.claim()
        rounds = [Round(i, self.folder / f"round-{i}") for i in range(1, len(self.sizes) + 1)]
        for round in rounds:
            if not round.finished:
                self.play(round)
        return [json.loads(round.path("report.json").read_text(encoding="utf-8")) for round in rounds]


def study_answers(o: StudyOptions, more: list[str]) -> list[dict[str, Any]]:
    """How right the reward model is by the number of answers, of random and of uncertain pairs."""
    found: dict[tuple[str, int], list[float]] = {}
    for seed in numbers(o.seeds):
        for pick in ("random", "uncertain"):
            out = pathlib.Path(o.out) / "answers" / f"{pick}-{seed}"
            own = (*JUDGE, "--error_rate", o.error_rate, "--pick", pick)
            growing = Growing(*loop.options_of(words(o, out, seed, (*own, *more))))
            growing.sizes = numbers(o.sizes)
            asked = Sampled(growing.prompts("val"), [growing.writer(growing.sft, "sft")],
                            seed=torch_seed(0, "loop", "ask", 0))  # the same for all loops from this SFT
            growing.test = ask(Round(0, pathlib.Path(o.out) / "answers" / f"test-{growing.hash}"), asked, o.test_pairs)
            for report in growing.run():
                found.setdefault((pick, report["answers"]), []).append(report["accuracy"])
    return [{"name": pick, "answers": n, "seeds": len(values), "accuracy": spread(values),
             "of seeds": {"accuracy": values}} for (pick, n), values in sorted(found.items())]


# ---- taste -------------------------------------------------------------------------------------------

def study_taste(o: StudyOptions, more: list[str]) -> list[dict[str, Any]]:
    """How often each of the two persons prefers the reply of the policy that learned from them to the other's,
    and to SFT's, on held-out prompts. Equally good replies count half. The policies are those of the last round:
    after one round, a model that has only seen SFT's replies may take empty ones for the best short ones."""
    rows = []
    for seed in numbers(o.seeds):
        folders = {}
        for person in PERSONS:
            out = pathlib.Path(o.out) / "taste" / f"{person}-{seed}"
            pairs = o.pairs or 300 // o.rounds
            loop.main(words(o, out, seed, ("--annotator", person, "--rounds", o.rounds, "--pairs", pairs, *more)))
            folders[person] = loop_folder(out) / f"round-{o.rounds}" / "ppo"
        known = loop.Loop(*loop.options_of(words(o, pathlib.Path(o.out), seed, more))).setting
        reference, tokenizer, _ = load_checkpoint(sft(o, seed), known.device)
        prompts = held_out_prompts(known.data, "val", tokenizer, reference.config.max_len - known.settings.reply_len,
                                   known.n_prompts)
        policies = {"SFT": reference} | {person: load_checkpoint(path, known.device)[0]
                                         for person, path in folders.items()}
        measured = {name: evaluate.measure_policy(policy, reference, tokenizer, prompts, known.data.template,
                                                  settings=known.settings)[:2] for name, policy in policies.items()}
        for person, other in zip(PERSONS, [*PERSONS][::-1], strict=True):
            row: dict[str, Any] = {"name": person, "seed": seed, "prompts": len(prompts),
                                   **{key: measured[person][0][key] for key in ("kl", "length", "distinct2")},
                                   "SFT length": measured["SFT"][0]["length"]}
            for rival in (other, "SFT"):
                cards = [Card("", mine["prompt"], (mine["reply"], theirs["reply"]))
                         for mine, theirs in zip(measured[person][1], measured[rival][1], strict=True)]
                deltas = FunctionAnnotator(PERSONS[person], person).deltas(cards)
                row[f"prefers to {'the other' if rival == other else rival}"] = mean_interval(
                    (deltas > 0) + (deltas == 0) / 2)
            rows.append(row)
    return rows


# ---- command line --------------------------------------------------------------------------------------

STUDIES = {"rounds": study_rounds, "answers": study_answers, "taste": study_taste}


def draw(study: str, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A picture of the figures of each seed; ImportError without matplotlib."""
    from matplotlib.figure import Figure  # an extra
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.add_subplot()
    if study == "answers":
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [row for row in rows if row["name"] == name]
            values, x = [row["of seeds"]["accuracy"] for row in mine], [row["answers"] for row in mine]
            ax.plot(x, [np.mean(v) for v in values], marker="o", label=f"{name} pairs")
            ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.18, linewidth=0)
        ax.set(xscale="log", xlabel="answers, a tenth of them held out",
               ylabel="agreement with the errorless judge")
        ax.set_xticks(x, labels=[f"{n:,}" for n in x])
        ax.set_xticks([], minor=True)
    else:
        names = [f"{row['name']}{', seed {}'.format(row['seed']) if 'seed' in row else ''}" for row in rows]
        keys = [key for key in {**rows[0], **rows[0].get("of seeds", {})} if key.startswith(("prefers", "win_"))]
        for key in keys:
            values = [row["of seeds"][key] if "of seeds" in row else list(row[key]) for row in rows]
            means = [np.mean(v) if "of seeds" in rows[0] else v[0] for v in values]
            ends = [[m - min(v) for m, v in zip(means, values, strict=True)],
                    [max(v) - m for m, v in zip(means, values, strict=True)]]
            ax.errorbar(names, means, ends, marker="o", capsize=3, label=key.replace("win_", "beats SFT, "))
        ax.axhline(0.5, color="#999999", linewidth=0.8)
        ax.set_ylabel("share of held-out prompts")
        ax.tick_params(axis="x", rotation=20)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    own, more = argv[:cut], argv[cut + 1:]
    study = own.pop(0) if own and not own[0].startswith("-") else ""
    o = parse(StudyOptions, own, f"-m tools.loop_study {'|'.join(STUDIES)}")
    if study not in STUDIES:
        raise UserError(f"usage: python -m tools.loop_study {'|'.join(STUDIES)} [--init_from SFT] [--out FOLDER]")
    Interrupt.install()
    rows = STUDIES[study](o, more)
    path = pathlib.Path(o.out) / study
    replace_text(path.with_suffix(".json"), to_json({"options": dataclasses.asdict(o), "more": more, "rows": rows}))
    print(table(rows, {key: key.replace("_", " ") for key in rows[0] if key != "of seeds"}))
    try:
        draw(study, rows, path.with_suffix(".png"))
    except ImportError:
        print("no picture: it needs matplotlib")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))

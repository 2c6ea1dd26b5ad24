"""
How well a language model recognises features from texts on which they fire: a detection score after
"Automatically Interpreting Millions of Features" (arXiv 2410.13928), without a written explanation in
between.

    python -m evals.sae_detection runs/topk runs/kron --texts unseen.jsonl --judge Qwen/Qwen2.5-1.5B-Instruct

For each of some features drawn at random, the judge is shown texts on which it fires most, the strongest
token in <<>>, and texts on which it is silent, each with "yes" or "no". It then answers for other texts, half
of which make the feature fire, by the difference of the logits of " yes" and " no". Beside accuracy and area
under the ROC curve stand those of the same questions with the examples' labels shuffled, which tell what the
judge knows without them: half of the labels of each kind, drawn at random, are exchanged, so the examples say
nothing. All SAEs of one --out must come from one layer of one model. An SAE that is measured is not measured
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.sae_study_tables import cell
from steer.errors import SteerError
from steer.files import replace_file
from steer.models import load_model, load_tokenizer
from steer.sae import SAE, load_sae
from steer.sae.activations import Reader, Window, check_base, windows
from steer.sae.texts import Texts

Judge = Callable[[Sequence[str]], list[float]]
ANSWERS = (" yes", " no")
ASK = "Some texts have a certain property, others do not. Where a text has it, << >> may mark where.\n\n"


@dataclass(frozen=True)
class Snippets:
    """
    Short texts and where features fire in them. peaks: (texts, features), the strongest activation; places:
    the token of it.
    """

    texts: list[list[str]]
    peaks: Tensor
    places: Tensor

    def show(self, index: int, feature: int | None = None) -> str:
        """A text on one line, the token on which `feature` is strongest in << >>."""
        tokens = list(self.texts[index])
        if feature is not None:
            place = int(self.places[index, feature])
            word = tokens[place].lstrip()
            tokens[place] = f"{tokens[place][: len(tokens[place]) - len(word)]}<<{word}>>"
        return " ".join("".join(tokens).split())


@torch.no_grad()
def read(sae: SAE, reader: Reader, tokenizer: PreTrainedTokenizerBase, found: Sequence[Window]) -> Snippets:
    """The features of `sae` on `found`, whose first tokens are not kept and not read."""
    peaks = torch.zeros(len(found), sae.cfg.d_sae)
    places = torch.zeros(len(found), sae.cfg.d_sae, dtype=torch.int16)
    for row, window in enumerate(found):
        features = sae.encode(reader.read([window]).to(sae.device, sae.dtype)).float().cpu()
        kept = torch.tensor([place for place, keep in enumerate(window.keep) if keep])
        strongest = features.max(0)
        peaks[row], places[row] = strongest.values, kept[strongest.indices].to(torch.int16)
    texts = [[str(tokenizer.decode([token])) for token in window.ids] for window in found]
    return Snippets(texts, peaks, places)


@dataclass(frozen=True)
class Detection:
    """How one feature is recognised, with true and with shuffled examples, in `asked` texts."""

    feature: int
    accuracy: float
    auc: float
    shuffled_accuracy: float
    shuffled_auc: float
    asked: int


def detect(snippets: Snippets, feature: int, judge: Judge, shown: int, asked: int, seed: int) -> Detection:
    """
    Ask about one feature: `shown` examples and `asked` questions of each kind. The examples are the texts on
    which it is strongest; the questions that fire are drawn from the others.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    peaks = snippets.peaks[:, feature]
    order = peaks.argsort(descending=True, stable=True)[: int((peaks > 0).sum())]
    silent = (peaks == 0).nonzero().squeeze(1)
    drawn = silent[torch.randperm(len(silent), generator=generator)][: shown + asked].tolist()
    others = order[shown:]
    firing = others[torch.randperm(len(others), generator=generator)][:asked].tolist()
    examples = [(snippets.show(index, feature), True) for index in order[:shown].tolist()]
    examples += [(snippets.show(index), False) for index in drawn[:shown]]
    # half of each kind, drawn at random
    exchanged = {
        kind * shown + place
        for kind in range(2)
        for place in torch.randperm(shown, generator=generator)[: shown // 2].tolist()
    }
    mixed = torch.randperm(len(examples), generator=generator).tolist()
    questions = [*firing, *drawn[shown:]]
    labels = [True] * len(firing) + [False] * (len(questions) - len(firing))
    scores = {}
    for kind in ("true", "shuffled"):
        told = [
            (text, label != (kind == "shuffled" and place in exchanged))
            for place, (text, label) in enumerate(examples)
        ]
        head = ASK + "".join(
            f"Text: {told[i][0]}\nHas it: {'yes' if told[i][1] else 'no'}\n\n" for i in mixed
        )
        scores[kind] = judge([f"{head}Text: {snippets.show(index)}\nHas it:" for index in questions])
    found = {kind: (accuracy(values, labels), auc(values, labels)) for kind, values in scores.items()}
    return Detection(feature, *found["true"], *found["shuffled"], len(questions))


def accuracy(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Share of the scores whose sign is that of the label; 0 is no."""
    return mean(float((score > 0) == label) for score, label in zip(scores, labels, strict=True))


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The probability that a text that has it scores higher than one that has not; ties count one half."""
    values, has = torch.tensor(scores, dtype=torch.float64), torch.tensor(labels)
    apart = values[has][:, None] - values[~has][None]
    return ((apart > 0).double() + 0.5 * (apart == 0).double()).mean().item()


def choose(snippets: Snippets, count: int, shown: int, asked: int, seed: int) -> list[int]:
    """`count` features drawn from those that fire and are silent on enough texts."""
    fires = (snippets.peaks > 0).sum(0)
    enough = (fires >= shown + asked) & (fires <= len(snippets.texts) - shown - asked)
    able = enough.nonzero().squeeze(1)
    if len(able) < count:
        raise SteerError(
            f"{len(able)} features fire on {shown + asked} texts or more and are silent on as many, "
            f"{count} were asked for; read more --snippets, or ask for fewer --features"
        )
    drawn = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))[:count]
    return sorted(able[drawn].tolist())


def logit_judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """The difference of the logits of " yes" and " no" after a prompt; SteerError where they begin alike."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ANSWERS)
    if yes == no:
        raise SteerError(
            "the judge's tokenizer begins ' yes' and ' no' with the same token; choose another --judge"
        )

    @torch.no_grad()
    def judge(prompts: Sequence[str]) -> list[float]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            found.append((logits[yes] - logits[no]).item())
        return found

    return judge


def run(args: argparse.Namespace) -> None:
    """Measure the SAEs that are not measured yet, print and write `detection.json`."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "detection.json"
    names = ("judge", "model", "dtype", "features", "shown", "asked", "snippets", "length", "seed")
    facts = {name: getattr(args, name) for name in names} | {"texts": [Path(t).name for t in args.texts]}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"facts": facts, "saes": {}}
    if results["facts"] != facts:
        raise SteerError(f"{path} holds results of other settings; give another --out or remove it")
    saes = {folder: load_sae(folder) for folder in args.saes if folder not in results["saes"]}
    if saes:
        place = _shared_place(saes, args.model, results, path)
        name = place["model"]
        model, tokenizer = load_model(name, dtype=args.dtype), load_tokenizer(name)
        reader = Reader(model, place["layer"], place["site"])
        found = list(islice(windows(Texts(args.texts), tokenizer, args.length), args.snippets))
        other = args.judge == name
        judge = logit_judge(
            model if other else load_model(args.judge, dtype=args.dtype),
            tokenizer if other else load_tokenizer(args.judge),
        )
    for folder, sae in saes.items():
        check_base(sae.cfg.source, model, folder)
        snippets = read(sae, reader, tokenizer, found)
        chosen = choose(snippets, args.features, args.shown, args.asked, args.seed)
        rows = [
            detect(snippets, f, judge, args.shown, args.asked, args.seed) for f in tqdm(chosen, desc=folder)
        ]
        results["saes"][folder] = {"k": sae.cfg.k, "features": [asdict(row) for row in rows]}
        replace_file(path, (json.dumps(results, indent=1) + "\n").encode())
    print(markdown({folder: results["saes"][folder] for folder in args.saes}))


def _shared_place(
    saes: dict[str, SAE], model: str | None, results: dict[str, Any], path: Path
) -> dict[str, Any]:
    """
    The model, layer and site of all SAEs, those of earlier calls too, which `results` keep; SteerError where
    they differ, and for results of old that do not say. model: what --model names.
    """
    if results["saes"] and "place" not in results:
        raise SteerError(
            f"{path} does not say of which model and layer the SAEs in it are; give another --out for "
            f"{', '.join(saes)}"
        )
    for folder, sae in saes.items():
        source = sae.cfg.source or {}
        own = {"model": model or source.get("model"), "layer": source.get("layer")}
        if not own["model"] or own["layer"] is None:
            raise SteerError(f"{folder} does not say which model and layer it is of; train it with steer sae")
        own["site"] = source.get("site", "resid_post")
        shared: dict[str, Any] = results.setdefault("place", own)
        for name, value in own.items():
            if value != shared[name]:
                raise SteerError(
                    f"{folder} is of {name} {value}, the other SAEs of {path} are of {shared[name]}; give "
                    "another --out"
                )
    return shared


def markdown(saes: dict[str, Any]) -> str:
    """Means and 95 % intervals over the features."""
    lines = ["| SAE | k | features | accuracy | shuffled | AUC | shuffled |", "|---|---|---|---|---|---|---|"]
    for folder, found in saes.items():
        keys = ("accuracy", "shuffled_accuracy", "auc", "shuffled_auc")
        cells = [cell([row[key] for row in found["features"]], 3) for key in keys]
        lines.append(f"| {folder} | {found['k']} | {len(found['features'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("saes", nargs="+", help="folders of SAEs of one layer")
    made.add_argument("--texts", nargs="+", required=True, help="texts to read, which trained no SAE")
    made.add_argument("--judge", required=True, help="language model that answers")
    made.add_argument("--model", help="model that the SAEs are of (default: what the first one says)")
    made.add_argument("--dtype", default="fast", help="of both models (default: %(default)s)")
    for name, default, text in (
        ("features", 20, "features of each SAE"),
        ("shown", 4, "examples of each kind, an even number"),
        ("asked", 10, "questions of each kind"),
        ("snippets", 4000, "texts that are read"),
        ("length", 32, "tokens of a text"),
        ("seed", 0, "of what is drawn"),
    ):
        made.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    made.add_argument("--out", default="runs/sae-detection", help="folder (default: %(default)s)")
    args = made.parse_args(arguments)
    if args.shown < 2 or args.shown % 2:
        raise SteerError(
            f"--shown {args.shown} is not an even number from 2; half of the labels are exchanged"
        )
    run(args)


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

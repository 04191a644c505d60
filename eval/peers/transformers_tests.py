"""transformers' own tests, run with neoquant's classes in the place of transformers'.

    git clone --depth 1 --branch v5.15.0 https://github.com/huggingface/transformers SOURCE
    python eval/peers/transformers_tests.py SOURCE --python PEER/bin/python --tokenizer GPT2

PEER is an environment with the same version of transformers, with pytest, parameterized and what neoquant needs; GPT2
a folder with GPT-2's tokenizer (the tests fetch it by its id). The tests are those of GPT-Neo's models, with the tests
of models, of generating and of pipelines that they inherit, and those of GPT-2's tokenizer.

What counts are the tests that transformers' own classes pass in the same environment, without a network: with
neoquant's, each of them passes, or is refused (neoquant says in words that it does not do this), or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance, versions_in

FILES = ("tests/models/gpt_neo/test_modeling_gpt_neo.py", "tests/models/gpt2/test_tokenization_gpt2.py")
GROUPS = {
    "tests/generation/test_utils.py": "generating",
    "tests/test_modeling_common.py": "models: loading, saving, training",
    "tests/models/gpt_neo/test_modeling_gpt_neo.py": "GPT-Neo",
    "tests/test_pipeline_mixin.py": "pipelines",
}
TOKENIZER = "tokenizer"
INSIDE = {
    "caches are of transformers' own class": (
        "test_assisted_decoding_", "test_beam_search_generate_dict_outputs_use_cache", "test_past_key_values_format",
        "test_greedy_generate_dict_outputs_use_cache", "test_generate_continue_from_past_key_values",
    ),
    "layers are of transformers' class of those that are computed again, or have its attributes": (
        "test_gradient_checkpointing_", "test_training_gradient_checkpointing", "test_peft_gradient_checkpointing",
    ),
    "the class has transformers' GenerationMixin": (
        "test_inherits_generation_mixin", "test_generation_tester_mixin_inheritance",
        "test_generate_with_and_without_position_ids",
    ),
    "private attributes of configurations, models or tokenizers": (
        "test_sdpa_can_dispatch_", "test_tied_weights_keys", "test_tp_plan_", "test_can_set_attention_dynamically",
        "test_resize_embeddings_untied_no_reinit_on_post_init", "test_added_tokens_serialization", "test_torch_fx",
        "test_tokenizer_store_full_signature", "test_tokenizer_fast_store_full_signature",
        "test_tokenizer_slow_store_full_signature",
        "test_internal_model_config_", "test_keep_in_fp32_modules", "test_init_weights_", "test_config_attn_",
    ),
}  # fmt: skip
"""What tests look at that is inside transformers, and how the tests' names begin that do."""
TEMPORARY = "tmp/tmp"
"""How the folders begin that tests make; in records they have no names."""
Outcomes = dict[str, dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="transformers' repository, at the version that --python has")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with GPT-2's tokenizer")
    parser.add_argument("--tests", default="SOURCE's own tag", help="for the record: where the tests come from")
    parser.add_argument("--json", type=Path, help="by default eval/results/transformers-tests-VERSION.json")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest")
    args = parser.parse_args()
    versions = versions_in(args.python, ("transformers", "torch", "tokenizers", "pytest"))
    with tempfile.TemporaryDirectory(prefix="neoquant-theirs-") as temp:
        theirs, ours = (run(args, place, Path(temp)) for place in ("transformers", "neoquant"))
    rows = compared(theirs, ours, str(args.tokenizer.resolve()))
    result = {
        "what": "transformers' own tests that its own classes pass, with neoquant's classes in their place",
        "provenance": provenance(("neoquant",)),
        "peer": versions,
        "tests": args.tests,
        "not_passed_by_transformers": dict(Counter(one["outcome"] for one in theirs.values() if not _passed(one))),
        "rows": rows,
    }
    path = args.json or ROOT / "eval" / "results" / f"transformers-tests-{versions['transformers']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in table(rows):
        print(line)


def run(args: argparse.Namespace, place: str, temp: Path) -> Outcomes:
    """What became of each test, by its class and name. Exits where pytest could not run them."""
    path = temp / f"{place}.json"
    here = str(Path(__file__).resolve().parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((here, str(ROOT))),
        "NEOQUANT_PLACE": place,
        "NEOQUANT_GPT2": str(args.tokenizer.resolve()),
        "NEOQUANT_OUTCOMES": str(path),
        "HF_HUB_OFFLINE": "1",
    }
    plugins = ("-p", "in_transformers_place", "-p", "no:cacheprovider")
    command = [str(args.python.absolute()), "-m", "pytest", "-q", "--tb=short", *plugins, *FILES, *args.pytest]
    done = subprocess.run(command, cwd=args.source, env=environment, capture_output=True, text=True)
    if not path.exists() or done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    found: Outcomes = json.loads(path.read_text("utf-8"))
    return found


def compared(theirs: Outcomes, ours: Outcomes, tokenizer: str) -> list[dict[str, str]]:
    """A row for each test that transformers' own classes pass. Folders of this machine have no names there."""
    rows = []
    for name, one in sorted(theirs.items()):
        if not _passed(one):
            continue
        other = ours.get(name, {"outcome": "not run", "error": "", "refused": ""})
        outcome = "passes" if _passed(other) else "refused" if other["refused"] else "fails"
        inside = [what for what, names in INSIDE.items() if name.partition("::")[2].startswith(names)]
        if other["outcome"] == "skipped":
            inside = ["the class, by which it skips itself"]
        if outcome == "fails" and inside:
            outcome = "inside"
        row = {"test": name, "group": GROUPS.get(one["defined_in"], TOKENIZER), "outcome": outcome}
        row |= {"looks_at": inside[0]} if outcome == "inside" else {}
        error = re.sub(rf"\S*{TEMPORARY}\w+|{re.escape(tokenizer)}", "FOLDER", other["error"] or other["outcome"])
        rows.append(row | ({} if outcome == "passes" else {"error": error}))
    return rows


def table(rows: list[dict[str, str]]) -> list[str]:
    """What became of the tests of each group, in lines."""
    lines = []
    for group in [*sorted({row["group"] for row in rows}), None]:
        found = Counter(row["outcome"] for row in rows if group in (row["group"], None))
        counts = ", ".join(f"{found[outcome]} {outcome}" for outcome in ("passes", "refused", "inside", "fails"))
        lines.append(f"{group or 'all'}: {found.total()} tests; {counts}")
    return lines


def _passed(one: dict[str, str]) -> bool:
    return one["outcome"] == "passed"


if __name__ == "__main__":
    main()

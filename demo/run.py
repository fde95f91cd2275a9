"""The demo: one long document, several questions, an engine that is restarted in between.

vLLM without kvkeep, then with it: what the first answer costs (cold), what it costs when the
engine's own cache has been emptied (warm), and after the engine was restarted while the keeper
lived on. Prints a table, writes result.json and result.png beside itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from document import QUESTIONS, document
from rich.console import Console
from rich.table import Table

from kvbench.engine import Answer, VllmServer, connector_args, fastest_dtype
from kvbench.servers import figures, keeper

HERE = Path(__file__).parent
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
ANSWER_TOKENS = 32
console = Console(highlight=False)
began = time.monotonic()


def say(text: str) -> None:
    """One line of progress with the time since the start."""
    console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}")


def ask(engine: VllmServer, model: str, text: str, question: str) -> Answer:
    """One question about the document; the document comes first, so that it is a shared prefix."""
    if model == "smollm2":
        return engine.chat(f"{text}\n\n{question} Answer in one sentence.", ANSWER_TOKENS)
    return engine.complete(f"{text}\n\nQuestion: {question}\nAnswer:", ANSWER_TOKENS)


def round_of_questions(engine: VllmServer, model: str, text: str, reset: bool) -> list[Answer]:
    """All questions; with `reset` the engine's own prefix cache is emptied before each."""
    answers = []
    for question in QUESTIONS:
        if reset:
            engine.reset_local_cache()
        answers.append(ask(engine, model, text, question))
        say(f"    {answers[-1].ttft_s:7.2f} s to the first token  [dim]{question}[/dim]")
    return answers


def without(model: str, text: str, args: list[str], out: Path) -> tuple[Answer, list[Answer]]:
    """The engine alone: a cold answer, then its own prefix cache."""
    say("vLLM without kvkeep: starting")
    with VllmServer(HERE / "models" / model, args, log=out / "engine-off.log") as engine:
        cold = first_answer(engine, model, text)
        say("the same engine's own prefix cache, while it lasts")
        return cold, round_of_questions(engine, model, text, reset=False)


def first_answer(engine: VllmServer, model: str, text: str) -> Answer:
    """The first question to an engine that has just started and knows nothing of the document."""
    warm_up(engine)
    say("cold: the whole document is prefilled")
    answer = ask(engine, model, text, QUESTIONS[0])
    say(f"    {answer.ttft_s:7.2f} s to the first token")
    return answer


def warm_up(engine: VllmServer) -> None:
    """First requests pay for lazy set-up; keep that out of every figure."""
    for length in (700, 40):
        engine.complete(list(range(100, 100 + length)), 2)


def run(model: str, out: Path) -> dict[str, Any]:
    """All three acts; returns the figures."""
    from transformers import AutoTokenizer

    text = document(AutoTokenizer.from_pretrained(HERE / "models" / model))
    dtype = fastest_dtype()
    say(f"model {MODELS[model]}, {dtype}; a document of {len(text)} characters: Python's language reference")
    args = ["--dtype", dtype, "--max-model-len", "8192"]
    off_cold, local = without(model, text, args, out)
    with tempfile.TemporaryDirectory(prefix="kvkeep-demo-") as folder:
        socket = f"{folder}/keeper.sock"
        say("kvkeep: starting a keeper, and vLLM with one flag more")
        with keeper(socket, "2GiB", [], out / "keeper.log"):
            args += connector_args(socket=socket)
            with VllmServer(HERE / "models" / model, args, log=out / "engine-on.log") as engine:
                cold = first_answer(engine, model, text)
                say("warm: the engine's own cache is emptied before each question")
                before = engine.metric("vllm:kvkeep_loaded_tokens_total")
                warm = round_of_questions(engine, model, text, reset=True)
                loaded = engine.metric("vllm:kvkeep_loaded_tokens_total") - before
            say("the engine is stopped and started again; the keeper lives on")
            with VllmServer(HERE / "models" / model, args, log=out / "engine-restarted.log") as engine:
                warm_up(engine)
                restarted = round_of_questions(engine, model, text, reset=True)
            held = figures(socket)["used_bytes"]
    expected = [answer.text for answer in local]
    return {
        "model": MODELS[model],
        "dtype": dtype,
        "prompt_tokens": cold.prompt_tokens,
        "kvkeep_off_ttft_s": off_cold.ttft_s,
        "local_hit_ttft_s": median(local[1:]),
        "cold_ttft_s": cold.ttft_s,
        "warm_ttft_s": median(warm),
        "restart_ttft_s": median(restarted),
        "tokens_loaded": int(loaded),
        "held_bytes": held,
        "answers_equal": all([a.text for a in answers] == expected for answers in (warm, restarted)),
        "answers": [{"question": q, "answer": a.text.strip()} for q, a in zip(QUESTIONS, warm, strict=True)],
    }


def median(answers: list[Answer]) -> float:
    """Median time to first token."""
    return statistics.median(answer.ttft_s for answer in answers)


ROWS = (
    ("vLLM alone, cold", "kvkeep_off_ttft_s"),
    ("vLLM alone, its own prefix cache", "local_hit_ttft_s"),
    ("with kvkeep, cold (prefilled and kept)", "cold_ttft_s"),
    ("with kvkeep, warm (own cache emptied)", "warm_ttft_s"),
    ("with kvkeep, engine restarted", "restart_ttft_s"),
)


def show(result: dict[str, Any]) -> None:
    """The table."""
    title = f"{result['model']} ({result['dtype']}), {result['prompt_tokens']} prompt tokens"
    table = Table("", "time to first token", "against cold", title=title)
    for name, field in ROWS:
        ratio = result["kvkeep_off_ttft_s"] / result[field]
        table.add_row(name, f"{result[field]:.3f} s", f"{ratio:.1f}×" if ratio > 1.5 else "")
    console.print(table)
    verdict = "equal" if result["answers_equal"] else "[red]NOT equal[/red]"
    console.print(
        f"answers with and without kvkeep: {verdict}; {result['tokens_loaded']} tokens loaded instead of "
        f"computed; {result['held_bytes'] / 1e6:.0f} MB held"
    )
    for row in result["answers"][:2]:
        console.print(f"[dim]{row['question']}[/dim] {row['answer']}")


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name, _ in ROWS][::-1]
    values = [result[field] for _, field in ROWS][::-1]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    bars = axes.barh(names, values, color=["#1f77b4" if "kvkeep" in name else "#999999" for name in names])
    axes.bar_label(bars, [f" {value:.2f} s" for value in values])
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel("time to first token, seconds (lower is better)")
    figure.suptitle(f"{result['prompt_tokens']} tokens of context, {result['model']}, 2 CPU cores", x=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run the demo; exit code 1 if an answer differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for result.json and result.png")
    args = parser.parse_args()
    logs = args.out / "out"
    logs.mkdir(parents=True, exist_ok=True)
    result = run(args.model, logs)
    show(result)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / "result.png")
    say(f"wrote {args.out.name}/result.json and {args.out.name}/result.png; the engines' logs are in out/")
    return 0 if result["answers_equal"] else 1


if __name__ == "__main__":
    raise SystemExit(main())

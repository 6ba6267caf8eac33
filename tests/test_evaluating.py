"""Real lm-eval runs of tiny models whose answers are known: scores, resuming, running out of memory, refusals."""

import errno
import hashlib
import importlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from talkers import FOUR, MURMUR, PLAIN, SHOUT, save_talker, talker, talker_tokenizer
from transformers import LlamaForCausalLM

from wpmerge.checkers import Checkers, read_checkers
from wpmerge.errors import EvaluationError, OutputError, WpmergeError
from wpmerge.evaluating import evaluate, file_name
from wpmerge.evaluation import Evaluation, Skill, load_evaluation
from wpmerge.harness import HarnessSettings, InMemory, model_identity
from wpmerge.ifeval import ifeval_checkers
from wpmerge.statistics import mean_score
from wpmerge.tasks import TaskSuite, load_tasks

SETTINGS = HarnessSettings(max_gen_tokens=24, device="cpu", batch_size=2)
STRICT = "ifeval/prompt_level_strict_acc"
BOTH = ["change_case:english_capital", "punctuation:no_comma"]
ASKED = [("it has no words", BOTH[:1]), ("the number", BOTH[1:]), ("you and it", BOTH), ("my words", BOTH[1:])]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    rows = [
        {"key": key, "prompt": prompt, "instruction_id_list": ids, "kwargs": [{} for _ in ids]}
        for key, (prompt, ids) in enumerate(ASKED)
    ]
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"ifeval": path}


def run(models: Mapping[str, Any], out: Path | None, data: Mapping[str, Any], **options: Any) -> Evaluation:
    return evaluate(models, out=out, **{"task_data": data, "settings": SETTINGS, "say": lambda _: None, **options})


def pair(sentence: str, **options: Any) -> tuple[Any, Any]:
    return talker(sentence, **options), talker_tokenizer()


def test_scores_of_known_answers(tmp_path: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    progress: list[tuple[str, int, int]] = []
    base = save_talker(tmp_path / "base", MURMUR)
    capfd.readouterr()
    found = run(
        {"base": base, "expert": pair(SHOUT), "merge": lambda: pair(PLAIN)},
        tmp_path / "out",
        data,
        base="base",
        skills={"format": Skill(expert="expert", metric=STRICT)},
        progress=lambda *each: progress.append(each),
    )
    # of 4 prompts, with 3 + 2 instructions: capitals in 0 and 2, no comma in 1, 2 and 3
    assert [each.scores[STRICT].value for each in found.models.values()] == [0.0, 1.0, 0.5]
    scores = found.models["merge"].scores
    assert scores["ifeval/inst_level_strict_acc"].value == 3 / 5
    assert scores["ifeval/inst_level_loose_acc/punctuation:no_comma"].value == 1.0
    assert scores["ifeval/inst_level_loose_acc/punctuation:no_comma"].n == 3
    assert scores["ifeval/inst_level_strict_acc/change_case:english_capital"].value == 0.0
    assert found.retention()["merge"].skills["format"].value == 0.5
    assert found.differences()["merge"][STRICT].value == 0.5
    assert [each for each in progress if each[0] == "base"] == [("base", done, 4) for done in (1, 2, 3, 4)]
    assert load_evaluation(tmp_path / "out") == found
    _check_files(tmp_path, found)
    noise = [line for line in capfd.readouterr().err.splitlines() if "it/s]" in line and "Loading weights" not in line]
    assert noise == []


def _check_files(tmp_path: Path, found: Evaluation) -> None:
    """lm-eval's own numbers and texts lie beside ours, and nothing else is left."""
    own = json.loads((tmp_path / "out" / "lm_eval" / "merge.json").read_text())
    row = own["results"]["ifeval"]
    score = found.models["merge"].scores[STRICT]
    assert row["prompt_level_strict_acc,none"] == score.value
    assert row["prompt_level_strict_acc_stderr,none"] == pytest.approx(score.stderr)
    samples = [json.loads(line) for line in (tmp_path / "out" / "lm_eval" / "merge.ifeval.jsonl").open()]
    assert [each["resps"][0][0] for each in samples] == [PLAIN] * 4
    assert samples[0]["arguments"][0][0] == "<user> it has no words <assistant>"
    assert {each.name for each in tmp_path.iterdir()} == {"base", "ifeval.jsonl", "out"}
    assert all(len(each.chat_template or "") == 64 for each in found.models.values())


def test_without_a_template_the_prompt_is_bare(data: dict[str, Path], tmp_path: Path) -> None:
    bare = (talker(PLAIN), talker_tokenizer(template=None))
    found = run({"bare": bare, "off": pair(PLAIN), "on": pair(PLAIN)}, None, data, settings=SETTINGS)
    assert found.models["bare"].chat_template is None
    assert found.models["on"].chat_template is not None
    # it goes on from the prompt's last word: "." after "words", which has no comma; nothing after "number" and "it"
    assert found.models["bare"].credits[STRICT] == [[0], [0], [0], [1]]
    assert any("different chat templates" in flag for flag in found.flags())
    off = HarnessSettings(max_gen_tokens=24, chat_template=False)
    assert run({"off": pair(PLAIN)}, None, data, settings=off).models["off"].chat_template is None
    with pytest.raises(EvaluationError, match=r"tokenizer has none(.|\n)*bare"):
        run({"bare": bare}, None, data, settings=HarnessSettings(max_gen_tokens=24, chat_template=True))


def test_local_answers_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": "the number", "answer": n}) + "\n" for n in (4, 12, 4)))
    options = {"tasks": ["sums"], "task_data": {"sums": path}}
    found = run({"m": pair(FOUR)}, None, {}, **options)
    assert found.models["m"].scores["sums/answer_acc"].value == pytest.approx(2 / 3)
    two = run({"m": pair(FOUR)}, None, {}, **options, settings=HarnessSettings(max_gen_tokens=24, limit=2))
    assert two.models["m"].credits["sums/answer_acc"] == [[1], [0]]
    assert len(two.documents["sums"]) == 2


class Fragile(LlamaForCausalLM):
    """Runs out of memory above a batch of one."""

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().forward(input_ids, *args, **kwargs)


class Hopeless(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def test_the_batch_is_halved_when_memory_runs_out(data: dict[str, Path]) -> None:
    said: list[str] = []
    settings = HarnessSettings(max_gen_tokens=24, batch_size=4)
    found = run({"m": pair(SHOUT, kind=Fragile)}, None, data, settings=settings, say=said.append)
    assert found.models["m"].scores[STRICT].value == 1.0
    assert found.models["m"].batch_size == 1
    assert [each for each in said if "memory" in each] == [
        "m: memory ran out at batch size 4; going on with 2",
        "m: memory ran out at batch size 2; going on with 1",
    ]
    with pytest.raises(EvaluationError, match=r"memory ran out(.|\n)*batch size 1"):
        run({"m": pair(SHOUT, kind=Hopeless)}, None, data)


class Interrupted(LlamaForCausalLM):
    """Stops like Ctrl-C after two batches."""

    prompts = 0

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        Interrupted.prompts += input_ids.shape[1] > 1
        if Interrupted.prompts == 2:
            raise KeyboardInterrupt
        return super().forward(input_ids, *args, **kwargs)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, data: dict[str, Path]) -> None:
    Interrupted.prompts = 0
    models = {"first": pair(PLAIN), "second": pair(SHOUT, kind=Interrupted)}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(models, out, data)
    assert not out.exists()
    said: list[str] = []
    found = run(models, out, data, say=said.append)
    assert said == [
        "first: finished in an earlier run",
        "second: going on with the requests that an earlier run finished",
    ]
    assert Interrupted.prompts == 3  # of two batches the first was kept, the second run again
    assert [each.scores[STRICT].value for each in found.models.values()] == [0.5, 1.0]
    assert {each.name for each in tmp_path.iterdir()} == {"ifeval.jsonl", "out"}


def test_finished_models_are_not_taken_for_others(tmp_path: Path, data: dict[str, Path]) -> None:
    out = tmp_path / "out"
    with pytest.raises(EvaluationError):
        run({"m": pair(PLAIN), "bad": pair(PLAIN, window=16)}, out, data)
    said: list[str] = []
    found = run({"m": pair(SHOUT)}, out, data, say=said.append)  # same name, other weights
    assert said == []
    assert found.models["m"].scores[STRICT].value == 1.0


WORDS = """
class Words:
    def __init__(self, instruction_id):
        pass
    def build_description(self, *, least=None):
        self.least = least
    def get_instruction_args(self):
        return {"least": self.least}
    def check_following(self, value):
        return COUNT >= self.least

INSTRUCTION_DICT = {"count:words": Words}
"""


@pytest.fixture
def counted(tmp_path: Path) -> dict[str, Path]:
    """Two documents, of which a sentence of 8 to 12 words and signs follows one."""
    asked = [{"prompt": "the number", "least": 4}, {"prompt": "my words", "least": 20}]
    rows = [
        {
            "key": key,
            "prompt": each["prompt"],
            "instruction_id_list": ["count:words"],
            "kwargs": [{**each, "prompt": None}],
        }
        for key, each in enumerate(asked)
    ]
    path = tmp_path / "counted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"counted": path}


def test_checkers_of_the_users_own_and_what_is_kept_when_they_change(tmp_path: Path, counted: dict[str, Path]) -> None:
    file, out, known = tmp_path / "own.py", tmp_path / "out", dict(ifeval_checkers())
    whole = "(len(value.split()) if 'eight' in value else {})"  # how a model's reply is counted; the trial's as it is

    def judged(count: str, models: Mapping[str, Any]) -> tuple[Evaluation | None, list[str]]:
        said: list[str] = []
        file.write_text(WORDS.replace("COUNT", whole.format(count)))
        options = {"tasks": ["counted"], "checkers": read_checkers([file]), "say": said.append}
        try:
            return run(models, out, counted, **options), said
        except EvaluationError as error:
            return None, [*said, str(error)]
        finally:
            assert dict(ifeval_checkers()) == known

    models = {"m": pair(PLAIN), "short": pair(PLAIN, window=16)}
    assert "whole window" in judged("len(value)", models)[1][-1]  # m is finished, short cannot be run
    # other checkers: m is judged again, from what it said
    went_on, failed = judged("1 / 0", {"m": pair(PLAIN)})[1]
    assert went_on == "m: going on with the requests that an earlier run finished"
    assert "own.py: count:words, check_following" in failed and "ZeroDivisionError" in failed
    found, said = judged("len(value.split())", {"m": pair(PLAIN)})
    assert said == ["m: going on with the requests that an earlier run finished"]
    assert found is not None
    assert found.models["m"].credits["counted/inst_level_strict_acc"] == [[1], [0]]
    assert found.models["m"].scores["counted/inst_level_strict_acc/count:words"].value == 0.5
    assert load_evaluation(out).provenance["checkers"] == [
        {"file": "own.py", "files": {"own.py": hashlib.sha256(file.read_bytes()).hexdigest()}}
    ]


def test_instruct_without_other_files_says_so(data: dict[str, Path]) -> None:
    for tasks, more, count in [(["instruct"], {}, 1), (["ifeval"], {}, 0), (["instruct"], {"own": data["ifeval"]}, 0)]:
        said: list[str] = []
        run({"m": pair(PLAIN)}, None, {**data, **more}, tasks=tasks, say=said.append)
        assert [("IFEval alone" in each) for each in said] == [True] * count


def test_an_evaluation_is_replaced_only_when_asked(tmp_path: Path, data: dict[str, Path]) -> None:
    out = tmp_path / "out"
    run({"m": pair(PLAIN)}, out, data)
    with pytest.raises(OutputError, match="--overwrite"):
        run({"m": pair(SHOUT)}, out, data)
    assert load_evaluation(out).models["m"].scores[STRICT].value == 0.5
    run({"m": pair(SHOUT)}, out, data, overwrite=True)
    assert load_evaluation(out).models["m"].scores[STRICT].value == 1.0
    model = save_talker(tmp_path / "model", PLAIN)
    with pytest.raises(OutputError, match="input"):
        run({"m": model}, model, data, overwrite=True)
    assert (model / "model.safetensors").is_file()


def test_what_is_no_model_is_refused_before_any_work(tmp_path: Path, data: dict[str, Path]) -> None:
    empty, adapter = tmp_path / "empty", tmp_path / "adapter"
    empty.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    good, out = pair(PLAIN), tmp_path / "out"
    for bad, message in [
        (empty, r"no checkpoint(.|\n)*bad: "),
        (adapter, "adapter"),
        (tmp_path / "absent", "no such checkpoint"),
        ("nobody/nothing", "nobody/nothing"),
    ]:
        with pytest.raises(WpmergeError, match=message):
            run({"good": good, "bad": bad}, out, data)
    assert not out.exists()
    broken = save_talker(tmp_path / "broken", PLAIN)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EvaluationError, match=r"cannot be loaded(.|\n)*bad: "):
        run({"bad": broken}, out, data)
    with pytest.raises(EvaluationError, match=r"cannot be loaded(.|\n)*no_such_backend"):
        run({"m": "x"}, None, data, settings=HarnessSettings(backend="no_such_backend"))


def changed(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def never(*_: Any) -> Any:
    pytest.fail("a model was opened")


def test_weights_that_are_not_the_models_are_refused_before_any_work(
    tmp_path: Path, data: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = save_talker(tmp_path / "whole", PLAIN)
    headless = changed(whole, tmp_path / "headless", lambda tensors: tensors.pop("lm_head.weight"))
    short = changed(whole, tmp_path / "short", lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-2].clone()}))
    capfd.readouterr()
    with pytest.raises(EvaluationError, match=r"lacks tensors(.|\n)*bad: .*headless(.|\n)*no lm_head.weight"):
        run({"first": never, "bad": headless}, tmp_path / "out", data)
    with pytest.raises(EvaluationError, match=r"another shape(.|\n)*bad: .*short(.|\n)*lm_head.weight \(27, 30\)"):
        run({"first": never, "bad": short}, tmp_path / "out", data)
    assert capfd.readouterr().err == ""
    tied = json.loads((headless / "config.json").read_text()) | {"tie_word_embeddings": True}
    (headless / "config.json").write_text(json.dumps(tied))
    run({"tied": headless}, None, data)  # the head is the embedding


def test_what_a_loader_raises_is_said_clearly(tmp_path: Path, data: dict[str, Path]) -> None:
    whole = save_talker(tmp_path / "whole", PLAIN)
    odd = replace(SETTINGS, model_args={"nonsense": 1})
    with pytest.raises(
        EvaluationError, match=r"cannot be loaded(.|\n)*m: (.|\n)*TypeError.*nonsense(.|\n)*--model-arg"
    ):
        run({"m": whole}, None, data, settings=odd)

    def raising(error: Exception) -> Callable[[], Any]:
        def load() -> Any:
            raise error

        return load

    with pytest.raises(EvaluationError, match=r"memory ran out while a model was loaded(.|\n)*m: loaded model"):
        run({"m": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))}, None, data)
    with pytest.raises(EvaluationError, match=r"cannot be loaded(.|\n)*RuntimeError: size mismatch"):
        run({"m": raising(RuntimeError("size mismatch"))}, None, data)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, data: dict[str, Path]) -> None:
    whole = save_talker(tmp_path / "whole", PLAIN)
    for value in (math.nan, math.inf):
        bad = changed(
            whole, tmp_path / f"{value}", lambda t, value=value: t["lm_head.weight"].view(-1)[7:8].fill_(value)
        )
        with pytest.raises(EvaluationError, match=rf"not finite(.|\n)*{value}, at flat index 7") as caught:
            run({"bad": bad}, None, data)
        assert caught.value.where == f"lm_head.weight in bad: {bad}"
    model, tokenizer = pair(PLAIN)
    model.model.norm.weight.data[0] = -math.inf
    with pytest.raises(EvaluationError, match=r"not finite(.|\n)*model.norm.weight in m: loaded model"):
        run({"m": (model, tokenizer)}, None, data)


def test_a_chat_template_that_fails_is_named_before_any_request(tmp_path: Path, data: dict[str, Path]) -> None:
    folder = save_talker(tmp_path / "m", PLAIN)
    for template in ("{% for x %}", "{{ raise_exception('no') }}", "{{ messages[0].a.b }}", "{{ 1 + 'a' }}"):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(EvaluationError, match=r"template cannot be applied(.|\n)*--no-chat-template") as caught:
            run({"m": folder}, None, data, progress=never)
        assert caught.value.where == f"m: {folder}"
    run({"m": folder}, None, data, settings=replace(SETTINGS, chat_template=False))
    odd = replace(SETTINGS, model_args={"chat_template_args": 5})
    with pytest.raises(EvaluationError, match=r"template cannot be applied(.|\n)*--model-arg"):
        run({"m": pair(PLAIN)}, None, data, settings=odd)
    (folder / "chat_template.jinja").write_text("{{ 4 // (messages[0].content | length - 11) }}<assistant>")
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):  # not of the trial: "it has no words" is "my words"
        run({"m": folder}, None, data)


@pytest.mark.parametrize("argument", [{"max_length": "abc"}, {"truncation": 1}, {"add_bos_token": "maybe"}])
def test_arguments_that_fail_while_a_model_runs_are_named(data: dict[str, Path], argument: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match=rf"Error: (.|\n)*{next(iter(argument))}(.|\n)*--model-arg") as caught:
        run({"m": pair(PLAIN)}, None, data, settings=replace(SETTINGS, model_args=argument))
    assert caught.value.where == "m"


class Faulty(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a bug")


def test_faults_of_a_program_are_not_taken_for_the_users(data: dict[str, Path]) -> None:
    for arguments in ({}, {"trust_remote_code": True}):
        with pytest.raises(TypeError, match="a bug"):
            run({"m": pair(PLAIN, kind=Faulty)}, None, data, settings=replace(SETTINGS, model_args=arguments))


def test_settings_that_cannot_be_are_refused() -> None:
    for argument, option in (("pretrained", "NAME=PATH"), ("batch_size", "--batch-size"), ("device", "--device")):
        with pytest.raises(EvaluationError, match=rf"--model-arg(.|\n)*{argument}=x(.|\n)*{option}"):
            HarnessSettings(model_args={argument: "x"})
    HarnessSettings(model_args={"max_batch_size": 8, "dtype": "float16"}, seed=2**32 - 1)
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(EvaluationError, match=r"seed is out of range(.|\n)*from 0 to 4294967295"):
            HarnessSettings(seed=seed)  # type: ignore[arg-type]


def test_a_model_that_brings_its_tokenizer_takes_no_other(tmp_path: Path, data: dict[str, Path]) -> None:
    save_talker(tmp_path / "m", PLAIN)
    settings = replace(SETTINGS, model_args={"tokenizer": str(tmp_path / "m")})
    with pytest.raises(EvaluationError, match=r"names a tokenizer(.|\n)*fused"):
        run({"m": tmp_path / "m", "fused": never}, None, data, settings=settings)
    run({"m": tmp_path / "m"}, None, data, settings=settings)


def test_what_is_read_is_never_replaced(tmp_path: Path, data: dict[str, Path]) -> None:
    out = tmp_path / "out"
    run({"m": pair(PLAIN)}, out, data)
    inside = {name: out / name for name in ("tasks.jsonl", "own.py", "plan")}
    shutil.copy(data["ifeval"], inside["tasks.jsonl"])
    inside["own.py"].write_text("INSTRUCTION_DICT = {'count:none': object}\n")
    inside["plan"].mkdir()
    whole = {"models": {"m": pair(PLAIN)}, "data": data}
    made = InMemory(load=never, inputs=(inside["plan"],))
    for more in (
        {"data": {"ifeval": inside["tasks.jsonl"]}},
        {"data": {"ifeval": {"": inside["tasks.jsonl"]}}},
        {"models": {"m": made}},
        {"settings": replace(SETTINGS, model_args={"peft": str(inside["plan"])})},
    ):
        with pytest.raises(OutputError, match="the output contains an input"):
            run(**{**whole, **more, "out": out, "overwrite": True})
    judges = (Checkers(file=inside["own.py"], files={"own.py": ""}, classes={}),)
    with pytest.raises(OutputError, match=r"contains an input(.|\n)*own.py"):
        run(**whole, out=out, checkers=judges, overwrite=True)
    with pytest.raises(OutputError, match="the output is an input"):
        run({"m": made}, inside["plan"], data, overwrite=True)
    assert all(each.exists() for each in inside.values())


@pytest.mark.parametrize("written", [r"m-\w+\.json", "evaluation.json"])
def test_a_full_disk_is_said_and_what_is_finished_is_kept(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    from wpmerge import evaluating

    whole = evaluating.write_file

    def full(path: Path, text: str) -> None:
        if re.fullmatch(written, path.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, text)

    monkeypatch.setattr(evaluating, "write_file", full)
    models, out = {"first": pair(SHOUT), "m": pair(PLAIN)}, tmp_path / "out"
    with pytest.raises(OutputError, match=r"disk is full(.|\n)*No space left(.|\n)*same command(.|\n)*kept"):
        run(models, out, data)
    assert not out.exists() and not (tmp_path / ".out.wpmerge").exists()
    monkeypatch.setattr(evaluating, "write_file", whole)
    said: list[str] = []
    assert run(models, out, data, say=said.append).models["m"].scores[STRICT].value == 0.5
    assert said[0] == "first: finished in an earlier run" and said[1].startswith("m: ")


def test_a_disk_that_fills_with_requests_is_said(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from sqlitedict import SqliteMultithread

    connect = SqliteMultithread._connect

    def small(self: Any) -> Any:
        connection, cursor = connect(self)
        cursor.execute("PRAGMA max_page_count = 1")
        return connection, cursor

    monkeypatch.setattr(SqliteMultithread, "_connect", small)
    with pytest.raises(OutputError, match=r"disk is full(.|\n)*database or disk is full"):
        run({"m": pair(PLAIN)}, tmp_path / "out", data)
    with pytest.raises(OutputError, match="TMPDIR"):
        run({"m": pair(PLAIN)}, None, data)
    assert "stack" not in capfd.readouterr().err
    monkeypatch.setattr(SqliteMultithread, "_connect", connect)
    run({"m": pair(PLAIN)}, tmp_path / "out", data)


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path: Path, data: dict[str, Path]) -> None:
    class Broken(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        run({"m": pair(PLAIN, kind=Broken)}, tmp_path / "out", data)


def test_long_names_of_models_and_tasks(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"prompt": "the number", "answer": 4}) + "\n")
    names, task = ("é" * 250, "é" * 249 + "a"), "t" * 250
    found = run({name: pair(FOUR) for name in names}, tmp_path / "out", {}, tasks=[task], task_data={task: path})
    assert [found.models[name].scores[f"{task}/answer_acc"].value for name in names] == [1, 1]
    files = [each.name for each in (tmp_path / "out" / "lm_eval").iterdir()]
    assert len(files) == 4 and all(len(each.encode()) < 230 for each in files)


def test_a_skill_of_no_evaluated_task_is_refused_before_any_work(data: dict[str, Path]) -> None:
    for metric in ("ifevl/prompt_level_strict_acc", "prompt_level_strict_acc"):
        with pytest.raises(EvaluationError, match=rf"no evaluated task(.|\n)*{metric}(.|\n)*ifeval"):
            run({"m": never}, None, data, base="m", skills={"s": Skill(expert="m", metric=metric)})


def test_a_skill_of_no_such_metric_is_refused_before_any_work(data: dict[str, Path]) -> None:
    for metric in ("ifeval/prompt_strict_acc", "ifeval/none", f"{STRICT},none", "ifeval/loose/no_comma"):
        with pytest.raises(EvaluationError, match=rf"none of its task(.|\n)*{metric}\n(.|\n)*ifeval/\w+_acc"):
            run({"m": never}, None, data, base="m", skills={"s": Skill(expert="m", metric=metric)})


def test_one_run_at_a_time_and_only_its_own_records_are_removed(tmp_path: Path, data: dict[str, Path]) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.models"

    def second() -> Any:
        with pytest.raises(OutputError, match="another run is writing this output"):
            run({"m": pair(PLAIN)}, out, data)
        (work / "somebody-0.json").write_text("{}")
        return pair(PLAIN)

    run({"m": second}, out, data)
    assert [each.name for each in work.iterdir()] == ["somebody-0.json"]
    run({"m": pair(PLAIN)}, out, data, overwrite=True)  # nothing is locked any more


def test_a_directory_is_told_by_its_files_whatever_the_backend(tmp_path: Path) -> None:
    folder = save_talker(tmp_path / "m", PLAIN)
    settings = HarnessSettings(backend="vllm", model_args={"lora": str(tmp_path / "beside")})
    beside = tmp_path / "beside"
    beside.mkdir()

    def identity() -> dict[str, Any]:
        return model_identity("m", str(folder), settings)[1]

    first = identity()
    assert identity() == first
    (folder / "model.safetensors").write_bytes(b"other")
    second = identity()
    (beside / "adapter.safetensors").write_bytes(b"x")
    assert first != second != identity()
    assert model_identity("m", "owner/name", HarnessSettings(backend="vllm"))[1]["name"] == "owner/name"


@pytest.mark.parametrize(
    ("dtype", "given", "passed"),
    [
        ("bfloat16", {}, {"dtype": "bfloat16"}),
        ("auto", {}, {}),
        ("bfloat16", {"dtype": "float16"}, {"dtype": "float16"}),
    ],
)
def test_other_backends_are_given_the_dtype(
    monkeypatch: pytest.MonkeyPatch, data: dict[str, Path], dtype: str, given: dict[str, str], passed: dict[str, str]
) -> None:
    from lm_eval.models.dummy import DummyLM

    found: list[dict[str, Any]] = []

    class Backend(DummyLM):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            found.append({name: each for name, each in arguments.items() if name in ("pretrained", "dtype")})

    monkeypatch.setattr("lm_eval.api.registry.get_model", lambda name: {"other": Backend}[name])
    settings = replace(SETTINGS, backend="other", dtype=dtype, model_args=given, chat_template=False)
    result = run({"m": "owner/name"}, None, data, settings=settings)
    assert found == [{"pretrained": "owner/name", **passed}]
    assert result.settings["dtype"] == dtype


@pytest.fixture
def fresh_humaneval() -> Iterator[None]:
    """lm-eval keeps the task's functions, and the judge that they loaded."""
    name = "lm_eval.tasks.humaneval.utils"
    before = sys.modules.pop(name, None)
    yield
    sys.modules.pop(name, None)
    if before is not None:
        sys.modules[name] = before


@pytest.mark.usefixtures("fresh_humaneval")
def test_code_is_judged_and_gives_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's HumanEval, documents local; in the place of the judge that it downloads, one that wants "MY"."""

    class Judge:
        def compute(self, *, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
            right = ["MY" in reply for replies in predictions for reply in replies]
            return {f"pass@{each}": sum(right) / len(right) for each in k}, {}

    monkeypatch.setattr("evaluate.load", lambda name: {"code_eval": Judge()}[name])
    row = {"task_id": "0", "prompt": "def f():", "test": "def check(g): pass", "entry_point": "f"}
    file = tmp_path / "h.jsonl"
    file.write_text(json.dumps(row) + "\n")
    options: dict[str, Any] = {
        "tasks": ["humaneval_instruct"],
        "base": "base",
        "settings": replace(SETTINGS, unsafe_code=True),
    }
    shouting, tokenizer = pair(SHOUT)
    first, unknown = tokenizer.convert_tokens_to_ids(["THIS", "<unk>"])  # the task begins the answer, in other words
    with torch.no_grad():
        shouting.lm_head.weight[first, unknown] = 1
    models = {"base": pair(MURMUR), "code": (shouting, tokenizer), "merge": (shouting, tokenizer)}
    skill = {"code": Skill(expert="code", metric="humaneval_instruct/pass@1,create_test")}
    found = run(models, tmp_path / "out", {"humaneval_instruct": file}, skills=skill, **options)
    assert [each.scores[skill["code"].metric].value for each in found.models.values()] == [0.0, 1.0, 1.0]
    kept = found.retention()["merge"]
    assert kept.minimum.value == 1.0
    wrong = {"code": Skill(expert="code", metric="humaneval_instruct/pass_at_k")}
    models["base"] = lambda: pytest.fail("no model is opened")
    with pytest.raises(EvaluationError, match=r"pass_at_k(.|\n)*pass@1,create_test"):
        run(models, tmp_path / "other", {"humaneval_instruct": file}, skills=wrong, **options)


def test_a_chat_server_is_sent_messages(monkeypatch: pytest.MonkeyPatch, data: dict[str, Path]) -> None:
    """Its template is its own: always on, and not known here."""
    from lm_eval.models.dummy import DummyLM

    asked: list[Any] = []

    class Backend(DummyLM):
        tokenizer = None
        tokenizer_name = "server"

        def __init__(self, **_: Any) -> None:
            super().__init__()

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            asked.append(chat_history)
            return json.dumps(chat_history)

        def chat_template(self, chat_template: Any = False) -> str:
            return ""

    monkeypatch.setattr("lm_eval.api.registry.get_model", lambda name: Backend)
    for backend, wanted, sent in (
        ("x-chat-completions", None, True),
        ("x-chat-completions", True, True),
        ("litellm", None, True),
        ("x-completions", None, False),
    ):
        asked.clear()
        result = run({"m": "owner/name"}, None, data, settings=replace(SETTINGS, backend=backend, chat_template=wanted))
        assert bool(asked) is sent, (backend, wanted)
        assert result.models["m"].chat_template == ("server" if sent else None)
    with pytest.raises(EvaluationError, match=r"its template(.|\n)*--no-chat-template"):
        run({"m": "owner/name"}, None, data, settings=replace(SETTINGS, backend="litellm", chat_template=False))
    with pytest.raises(EvaluationError, match="has none"):
        run({"m": "owner/name"}, None, data, settings=replace(SETTINGS, backend="x-completions", chat_template=True))


@pytest.mark.parametrize(("seed", "examples"), [(None, 1234), (0, 0), (7, 7)])
def test_draws_are_lm_evals_own_unless_a_seed_is_given(
    monkeypatch: pytest.MonkeyPatch, data: dict[str, Path], seed: int | None, examples: int
) -> None:
    seeds: list[dict[str, int]] = []
    simple = importlib.import_module("lm_eval.evaluator").simple_evaluate

    def spied(*args: Any, **kwargs: Any) -> Any:
        found = simple(*args, **kwargs)
        seeds.append({name: found["config"][name] for name in ("random_seed", "fewshot_seed")})
        return found

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", spied)
    run({"m": pair(PLAIN)}, None, data, settings=replace(SETTINGS, seed=seed))
    assert seeds == [{"random_seed": seed or 0, "fewshot_seed": examples}]


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_outcomes_give_lm_evals_own_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_size: bool
) -> None:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    answers = {"two_sums": (4, 12), "six_sums": (4, 4, 4, 12, 4, 4)}  # one of two, five of six
    files = {name: tmp_path / f"{name}.jsonl" for name in answers}
    for name, path in files.items():
        path.write_text("".join(json.dumps({"prompt": "the number", "answer": n}) + "\n" for n in answers[name]))

    def grouped(*_: Any, **options: Any) -> TaskSuite:
        suite = load_tasks(list(files), task_data=files)
        aggregated = [AggMetricConfig(metric="answer_acc", weight_by_size=by_size)]
        group = Group("both", aggregate_metric_list=aggregated)
        for task in suite.loaded:
            group.add(task)
        return replace(suite, names=("both",), loaded=(group,), groups={"both": group})

    monkeypatch.setattr("wpmerge.evaluating.load_tasks", grouped)
    found = run({"base": pair(PLAIN), "m": pair(FOUR)}, tmp_path / "out", {}, base="base")
    score = found.models["m"].scores["both/answer_acc"].value
    assert score == pytest.approx(6 / 8 if by_size else (1 / 2 + 5 / 6) / 2)
    assert mean_score(found.outcomes("m", "both/answer_acc")) == pytest.approx(score)
    assert found.differences()["m"]["both/answer_acc"].value == pytest.approx(score)
    assert load_evaluation(tmp_path / "out") == found


def test_a_perplexity_has_a_score_and_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": "the number", "answer": n}) + "\n" for n in (4, 12)))

    def perplexing(*_: Any, **options: Any) -> TaskSuite:
        """Each reply's number is called a log-likelihood, lower where the reply is wrong."""
        from lm_eval.api.registry import get_metric_aggregation

        suite = load_tasks(["sums"], task_data={"sums": file})
        (task,) = suite.loaded
        judge, aggregate = task.process_results, task.aggregation()
        task.process_results = lambda *given: (found := judge(*given)) | {"perplexity": found["answer_acc"] - 2.0}
        task.aggregation = lambda: aggregate | {"perplexity": get_metric_aggregation("perplexity")}
        task.higher_is_better = lambda: {"answer_acc": True, "perplexity": False}
        return suite

    monkeypatch.setattr("wpmerge.evaluating.load_tasks", perplexing)
    found = run({"base": pair(PLAIN), "m": pair(FOUR)}, tmp_path / "out", {}, reference="base")
    scores = {name: each.scores["sums/perplexity"].value for name, each in found.models.items()}
    assert scores["base"] == pytest.approx(math.exp(2.0))
    assert scores["m"] == pytest.approx(math.exp(1.5))
    assert set(found.differences()["m"]) == {"sums/answer_acc"}
    with pytest.raises(EvaluationError, match="no outcomes of such a metric"):
        found.outcomes("m", "sums/perplexity")


def test_refusals_of_names_and_lengths(data: dict[str, Path]) -> None:
    models = {"m": pair(PLAIN)}
    with pytest.raises(EvaluationError, match="no model to evaluate"):
        run({}, None, data)
    for names in ({"reference": "x"}, {"base": "x"}, {"skills": {"s": Skill(expert="x", metric=STRICT)}}):
        with pytest.raises(EvaluationError, match=r"no such model(.|\n)*x"):
            run(models, None, data, **names)
    with pytest.raises(EvaluationError, match=r"whole window(.|\n)*1280 new tokens(.|\n)*fewer than 128"):
        run(models, None, data, settings=HarnessSettings())


def test_cut_prompts_are_said(data: dict[str, Path]) -> None:
    said: list[str] = []
    found = run({"m": pair(SHOUT, window=28)}, None, data, say=said.append)  # 4 tokens are left for the prompt
    # only "the number" and "my words" fit, in 4 tokens with the template's two
    assert found.models["m"].truncated == 2
    assert said == ["m: 2 prompts were cut from the left to fit the model's window"]


def test_file_names_stay_apart() -> None:
    assert file_name("base") == "base"
    assert file_name("uniform 0.6") != file_name("uniform_0.6")
    assert "/" not in file_name("../../etc/passwd")
    assert file_name("..") not in ("..", ".")
    assert file_name("a" * 100) == "a" * 100
    assert len({file_name("a" * n) for n in (100, 101, 250)}) == 3 and len(file_name("a" * 250)) == 100

"""A cluster file: what it means, and one sentence for each way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import EXAMPLE, ConfigError, parse
from cluster.plan import ROOT, Plan, Role, build, demo, load, locate_beside


def plan_of(text: str) -> Plan:
    return build(parse(text, "c.yaml"), "c.yaml", locate=lambda written: f"/models/{written}")


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith("c.yaml")
    return sentence


def test_the_example_is_a_valid_cluster(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(EXAMPLE)
    plan = load(file)
    assert [process.name for process in plan.processes] == ["controller", "ui", "fast", "hf-1"]


def test_a_worker_becomes_a_command() -> None:
    plan = plan_of(
        "controller: {port: 21001, args: [--dispatch-method, lottery]}\n"
        "workers:\n"
        "  - {kind: sglang, name: fast, model-path: llava, model-name: eyes, gpus: '0,1',\n"
        "     args: [--, --tp-size, 2], env: {OMP_NUM_THREADS: 2}}\n"
    )
    (worker,) = plan.workers
    argv = worker.argv(40123, "http://127.0.0.1:21001", log_json=True)
    assert argv == [
        *("-m", "workers.sglang", "--model-path", "/models/llava", "--model-name", "eyes"),
        *("--host", "127.0.0.1", "--port", "40123"),
        *("--worker-id", "fast", "--controller-address", "http://127.0.0.1:21001"),
        *("--worker-address", "http://127.0.0.1:40123", "--log-json", "--", "--tp-size", "2"),
    ]
    assert worker.env == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert plan.controller.argv(21001, "")[-2:] == ["--dispatch-method", "lottery"]


def test_names_number_each_kind_and_count_multiplies() -> None:
    plan = plan_of(
        "workers:\n"
        "  - {kind: echo, count: 2}\n"
        "  - {kind: hf, model-path: m}\n"
        "  - {kind: echo}\n"
        "  - {kind: echo, name: spare, count: 2}\n"
    )
    names = [worker.name for worker in plan.workers]
    assert names == ["echo-1", "echo-2", "hf-1", "echo-3", "spare-1", "spare-2"]
    assert all(worker.port is None for worker in plan.workers)


def test_a_device_of_numbers_chooses_gpus() -> None:
    (worker,) = plan_of("workers: [{kind: hf, model-path: m, device: 0}]").workers
    assert worker.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert worker.flags[-2:] == ("--device", "cuda")


def test_a_host_for_everyone_is_reached_on_loopback() -> None:
    plan = plan_of("controller: {host: 0.0.0.0, port: auto}\nworkers: []")
    assert plan.controller.address(5000) == "http://127.0.0.1:5000"
    assert plan.controller.argv(5000, "")[2:4] == ["--host", "0.0.0.0"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("workers: [", 1, "not valid YAML"),
        ("workers: []\nworkers: []", 2, "the key workers is repeated"),
        ("controler: {}\nworkers: []", 1, "controler is not a known key; did you mean controller?"),
        ("workers:\n  - kind: echo\n    prot: 1", 3, "workers[0].prot is not a known key"),
        ("workers:\n  - kind: hf\n    model_path: m", 3, "did you mean model-path?"),
        ("workers:\n  - kind: vllm", 2, "should be one of sglang, hf, echo, not 'vllm'"),
        ("workers:\n  - name: x", 2, "workers[0].kind is missing"),
        ("controller: {}", 1, "workers is missing"),
        ("workers: echo", 1, "workers should be a list, not 'echo'"),
        ("- a", 1, "the file should be a mapping"),
        ("workers:\n  - echo", 2, "workers[0] should be a mapping"),
        ("controller:\n  port: high\nworkers: []", 2, "auto or a number from 1 to 65535"),
        ("controller:\n  port: 70000\nworkers: []", 2, "auto or a number from 1 to 65535"),
        ("workers:\n  - kind: echo\n    count: 0", 3, "workers[0].count should be greater"),
        ("workers:\n  - kind: echo\n    count: two", 3, "should be a valid integer"),
        ("workers:\n  - kind: echo\n    env: {A: [1]}", 3, "workers[0].env.A should be a valid"),
        ("workers:\n  - kind: echo\n    name: ../x", 3, "workers[0].name cannot be '../x'"),
        ("workers:\n  - kind: echo\n    args: [--port=1]", 3, "write the key port instead"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(text: str, line: int, said: str) -> None:
    sentence = complaint(text)
    assert sentence.startswith(f"c.yaml, line {line}: ")
    assert said in sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("workers: [{kind: hf}]", "workers[0]: model-path is missing"),
        ("workers: [{kind: echo, model-path: m}]", "an echo worker has no model-path"),
        ("workers: [{kind: echo, count: 2, port: 4000}]", "cannot share one port"),
        ("workers: [{kind: echo, name: a}, {kind: echo, name: a}]", "two processes are named a"),
        ("workers: [{kind: echo, name: controller}]", "two processes are named controller"),
        ("controller: {port: 4000}\nworkers: [{kind: echo, port: 4000}]", "both want port 4000"),
        ("workers: [{kind: hf, model-path: m, device: '0', gpus: '1'}]", "both choose GPUs"),
        ("controller: {args: [--ssl-certfile, c.pem]}\nworkers: []", "reach each other by http"),
    ],
)
def test_workers_that_contradict_each_other(text: str, said: str) -> None:
    assert said in complaint(text)


def test_a_file_that_is_missing_or_unreadable_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"workers: [] # caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "latin.yaml")


def test_a_model_is_found_beside_the_file_in_the_checkout_or_on_the_hub(tmp_path: Path) -> None:
    locate = locate_beside(tmp_path / "cluster.yaml")
    (tmp_path / "mine").mkdir()
    assert locate("mine") == str(tmp_path / "mine")
    assert locate("models/pocket-llava") == str(ROOT / "models" / "pocket-llava")
    assert locate("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    for missing in ("other", "models/typo", "./a/b", "/no/where"):
        with pytest.raises(ConfigError, match="no model at"):
            locate(missing)


def test_a_page_is_started_only_where_the_file_asks_for_one() -> None:
    assert plan_of("workers: [{kind: echo}]").page is None
    page = plan_of("ui: {port: auto, args: [--title, Ours]}\nworkers: [{kind: echo}]").page
    assert page is not None
    argv = page.argv(7861, "http://127.0.0.1:21001")
    assert argv[:2] == ["-m", "ui"]
    assert argv[argv.index("--controller-address") + 1] == "http://127.0.0.1:21001"
    assert argv[-2:] == ["--title", "Ours"]
    assert "ui.prot is not a known key; did you mean port?" in complaint(
        "ui: {prot: 1}\nworkers: []"
    )


def test_the_demo_is_a_page_and_one_worker_of_each_kind() -> None:
    plan = demo(gpu=False)
    assert plan.page is not None
    assert [worker.kind for worker in plan.workers] == ["sglang", "hf"]
    assert {worker.role for worker in plan.workers} == {Role.WORKER}
    sglang, hf = demo(gpu=True).workers
    assert (sglang.device, hf.device) == ("cuda", "cuda")
    assert "--mem-fraction-static" in sglang.args

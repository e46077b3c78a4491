"""workers.sglang's adapters: computed as PEFT does in the form SGLang gets, and their life.

pytest tests/unit/test_sglang_adapters.py
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.errors import AdapterNotFound, EngineFailed, InvalidRequest, Unsupported
from workers.settings import EMBEDDED_MODEL
from workers.sglang.adapters import Adapters, largest_rank
from workers.sglang.process import TemporaryDirectory
from workers.sglang.settings import SglangSettings
from workers.sglang.targets import FUSED, TARGETS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tests.unit.test_hf_adapters import (  # noqa: E402
    FORMAL,
    IDS,
    TERSE,
    WEIGHTS,
    logits,
    put,
    saved_by_peft,
    tiny,
)
from tests.unit.test_hf_adapters import rewrite as changed  # noqa: E402
from workers.sglang import adapter_files  # noqa: E402
from workers.sglang.adapter_files import skeleton  # noqa: E402

pytestmark = pytest.mark.timeout(60)  # transformers is slow to import


def bare(**config: Any) -> Any:
    return skeleton(tiny(**config).config, trust_remote_code=False)


def rewrite(network: Any, path: str, folder: Path) -> int:
    folder.mkdir()
    return adapter_files.rewrite(network, path, str(folder))


@pytest.fixture(scope="module")
def pocket() -> Any:
    return skeleton(str(EMBEDDED_MODEL), trust_remote_code=False)


# ---------------------------------------------------------------- the files


def test_a_skeleton_holds_no_weights(pocket: Any) -> None:
    assert all(weight.is_meta for weight in pocket.parameters())
    assert pocket.get_submodule("model.language_model.layers.4.mlp.up_proj").out_features


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 4},
        {"target_modules": r".*\.[kv]_proj", "rank_pattern": {"v_proj": 2}, "lora_alpha": 5},
        {"target_modules": ["o_proj"], "alpha_pattern": {r"layers\.[01]\.self_attn\.o_proj": 30}},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    ],
    ids=["rslora", "ranks", "alphas", "all", "layers"],
)
def test_it_computes_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    """In the rewritten form: scale 1, one rank, and all layers that SGLang fuses."""
    from peft import PeftModel

    ids = IDS % 96
    wanted = logits(saved_by_peft(tiny(), tmp_path / "given", **config), ids)
    rank = rewrite(bare(), str(tmp_path / "given"), tmp_path / "rewritten")
    said = json.loads((tmp_path / "rewritten" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == rank
    weights = load_file(tmp_path / "rewritten" / WEIGHTS)
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {rank}
    for group in FUSED:
        layers = [{key for key in weights if f".{part}." in key} for part in group]
        assert len({len(layer) for layer in layers}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that it does not change
        again = PeftModel.from_pretrained(tiny(), str(tmp_path / "rewritten"))
    found = logits(again.eval(), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("older", ["language_model.model.", "model."])
def test_names_of_every_generation(pocket: Any, tmp_path: Path, older: str) -> None:
    folder = changed(
        put(tmp_path),
        lambda found: {k.replace("model.language_model.", older): v for k, v in found.items()},
    )
    assert rewrite(pocket, str(folder), tmp_path / "older") == 6
    assert rewrite(pocket, FORMAL, tmp_path / "newer") == 6
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("older", "newer"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name.split(".")[-3] for name in wanted} == set(TARGETS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head; with SGLang"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "changes lm_head"),
    ],
    ids=["head", "saved head"],
)
def test_what_sglang_does_not_adapt(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    saved_by_peft(tiny(), tmp_path / "given", **config)
    refused(bare(), tmp_path / "given", words)


def test_biases_of_an_adapter(tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True}
    saved_by_peft(tiny(**biased), tmp_path / "x", target_modules=["q_proj"], lora_bias=True)
    refused(bare(**biased), tmp_path / "x", "changes model.layers.0.self_attn.q_proj")


def test_an_adapter_of_the_vision_tower(pocket: Any, tmp_path: Path) -> None:
    """Its layers have the names and numbers of the language model's."""
    tower = "model.vision_tower.encoder."
    layers = [n for n, _ in pocket.named_modules() if n.startswith(tower) and n.endswith("q_proj")]
    assert layers
    weights = {}
    for layer in layers:
        size = pocket.get_submodule(layer).in_features
        weights[f"base_model.model.{layer}.lora_A.weight"] = torch.ones(6, size)
        weights[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(size, 6)
    folder = put(tmp_path, target_modules=["q_proj"], exclude_modules=None)
    refused(pocket, changed(folder, lambda _: weights), rf"changes {layers[0]}")


def test_an_adapter_with_llavas_projector(pocket: Any, tmp_path: Path) -> None:
    folder = put(tmp_path)
    torch.save({}, folder / "non_lora_trainables.bin")
    refused(pocket, folder, "changes what non_lora_trainables.bin holds")


def test_what_is_no_adapter(pocket: Any, tmp_path: Path) -> None:
    refused(pocket, tmp_path, "holds no adapter_config.json")
    refused(pocket, put(tmp_path, use_dora=True), "uses PEFT's use_dora")
    refused(bare(), Path(FORMAL), "there is no layer")


def refused(network: Any, folder: Path, words: str) -> None:
    with pytest.raises(EngineFailed, match=words) as caught:
        adapter_files.rewrite(network, str(folder), str(folder))
    assert caught.value.remedy


def settings(**given: Any) -> SglangSettings:
    return SglangSettings(**given)


def test_the_rank_there_must_be_room_for(tmp_path: Path) -> None:
    large = put(tmp_path, r=8, rank_pattern={"q_proj": 32})
    assert largest_rank(settings()) == 0
    assert largest_rank(settings(max_adapter_rank=4)) == 4
    assert largest_rank(settings(adapter=(f"a={FORMAL}",), max_adapter_rank=4)) == 6
    assert largest_rank(settings(adapter=(f"a={FORMAL}", f"b={large}"))) == 32
    with pytest.raises(EngineFailed, match="holds no adapter_config"):
        largest_rank(settings(adapter=(f"a={tmp_path}",)))


@pytest.mark.parametrize("among", [{"dp": 2}, {"nnodes": 2, "dist_init_addr": "h:1"}])
def test_adapters_are_for_one_server(among: dict[str, Any]) -> None:
    settings(**among)
    for given in ({"adapter": (f"a={FORMAL}",)}, {"max_adapter_rank": 8}):
        with pytest.raises(ValidationError, match="start several workers"):
            settings(**among, **given)


# ---------------------------------------------------------------- their life


class Server:
    """What an ``SglangClient`` says to a server, kept."""

    base_url = "http://127.0.0.1:1"

    def __init__(
        self, *, own: tuple[str, ...] = (), refuse: bool = False, mute: bool = False
    ) -> None:
        self.loaded: dict[str, bool] = dict.fromkeys(own, True)
        self._refuse = refuse
        self._mute = mute

    async def adapters(self) -> tuple[str, ...]:
        return tuple(self.loaded)

    async def load_adapter(self, name: str, path: str) -> None:
        await asyncio.sleep(0)
        if self._refuse:
            raise InvalidRequest("SGLang does not take the adapter: no.")
        self.loaded[name] = WEIGHTS in await asyncio.to_thread(os.listdir, path)
        if self._mute:
            raise EngineFailed("It did not answer.")

    async def unload_adapter(self, name: str) -> None:
        del self.loaded[name]


LORA = {"enable_lora": True, "max_lora_rank": 6}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


async def opened(server: Server, **given: Any) -> Adapters:
    made = Adapters(settings(**given), TemporaryDirectory())
    await asyncio.to_thread(made.prepare)
    await made.open(server, LORA)  # type: ignore[arg-type]
    return made


async def test_adapters_come_and_go() -> None:
    server = Server()
    made = await opened(server, adapter=(f"formal={FORMAL}", f"terse={TERSE}"))
    assert made.names == ("formal", "terse")
    assert list(server.loaded.values()) == [True, True]
    assert not server.loaded.keys() & {"formal", "terse"}, "names that no request can say"
    with made.using("terse") as known, made.using(None) as base:
        assert known in server.loaded
        assert base is None
    await made.unload("terse")
    assert known not in server.loaded
    with pytest.raises(AdapterNotFound), ExitStack() as stack:
        stack.enter_context(made.using("terse"))
    await made.load("terse", FORMAL)
    with made.using("terse") as again:
        assert again != known
    assert not await asyncio.to_thread(os.listdir, made._files._directory.make()), "they were read"
    await made.aclose()
    await made.aclose()
    with pytest.raises(Unsupported):
        await made.load("late", FORMAL)


async def test_what_is_prepared_when_all_ends_is_removed() -> None:
    directory = TemporaryDirectory()
    made = Adapters(settings(adapter=(f"formal={FORMAL}",)), directory)
    await asyncio.to_thread(made.prepare)
    [rewritten] = made._prepared.values()
    assert await asyncio.to_thread(os.listdir, rewritten.folder)
    await made.aclose()
    await asyncio.to_thread(directory.remove)
    assert not await asyncio.to_thread(os.path.exists, rewritten.folder)
    with pytest.raises(EngineFailed, match="was stopped"):
        await asyncio.to_thread(made.prepare)


async def test_one_that_is_used_leaves_afterwards() -> None:
    server = Server()
    made = await opened(server, adapter=(f"formal={FORMAL}",))
    with made.using("formal"):
        with made.using("formal"):
            leaving = asyncio.create_task(made.unload("formal"))
            await asyncio.sleep(0)
            assert made.names == ()
            with pytest.raises(AdapterNotFound):
                await made.unload("formal")
            with pytest.raises(InvalidRequest, match="loaded already"):
                await made.load("formal", TERSE)
        await asyncio.sleep(0)
        assert server.loaded
    await leaving
    assert not server.loaded
    await made.aclose()


async def test_who_gives_up_unloading_leaves_it_loaded() -> None:
    made = await opened(Server(), adapter=(f"formal={FORMAL}",))
    with made.using("formal"):
        leaving = asyncio.create_task(made.unload("formal"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert made.names == ("formal",)
    await made.aclose()


async def test_a_name_is_given_once() -> None:
    made = await opened(Server(), adapter=(f"formal={FORMAL}",))
    with pytest.raises(InvalidRequest, match="'formal' is loaded already"):
        await made.load("formal", TERSE)
    both = await asyncio.gather(
        made.load("a", TERSE), made.load("a", FORMAL), return_exceptions=True
    )
    assert [type(found) for found in both if found is not None] == [InvalidRequest]
    assert made.names == ("formal", "a")
    await made.aclose()


async def test_one_that_is_too_large(tmp_path: Path) -> None:
    def lengthened(name: str, tensor: Any) -> Any:
        more = (3, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 3)
        return torch.cat([tensor, torch.zeros(more)], dim=int("lora_B" in name))

    folder = changed(
        put(tmp_path, r=9), lambda found: {k: lengthened(k, v) for k, v in found.items()}
    )
    made = await opened(Server(), max_adapter_rank=6)
    words = r"has rank 9; there is room for adapters up to rank 6\."
    with pytest.raises(InvalidRequest, match=words) as caught:
        await made.load("large", str(folder))
    assert caught.value.remedy == "Start the worker with --max-adapter-rank 9."
    assert made.names == ()
    await made.aclose()


async def test_a_server_that_refuses() -> None:
    made = await opened(Server(refuse=True))
    with pytest.raises(InvalidRequest, match="does not take the adapter"):
        await made.load("a", FORMAL)
    assert made.names == ()
    with pytest.raises(InvalidRequest, match="is no directory here"):
        await made.load("a", "/nowhere/at/all")
    with pytest.raises(EngineFailed, match="does not take the adapter"):
        await opened(Server(refuse=True), adapter=(f"formal={FORMAL}",))
    await made.aclose()


async def test_what_may_have_come_in_all_the_same_is_taken_out() -> None:
    server = Server(mute=True)
    made = await opened(server)
    with pytest.raises(EngineFailed, match="did not answer"):
        await made.load("a", FORMAL)
    assert (made.names, server.loaded) == ((), {})
    await made.aclose()


async def test_a_server_without_room() -> None:
    made = Adapters(settings(), TemporaryDirectory())
    await made.open(Server(), {"enable_lora": None})  # type: ignore[arg-type]
    assert not made.enabled
    for refusal in (made.load("a", FORMAL), made.unload("a")):
        with pytest.raises(Unsupported, match="without room for adapters"):
            await refusal
    made = Adapters(settings(adapter=(f"formal={FORMAL}",)), TemporaryDirectory())
    await asyncio.to_thread(made.prepare)
    with pytest.raises(EngineFailed, match="takes no adapters"):
        await made.open(Server(), {"enable_lora": False})  # type: ignore[arg-type]
    await made.aclose()


async def test_a_server_of_somebody_elses() -> None:
    """Its adapters can be chosen; ours are taken out when we leave."""
    server = Server(own=("theirs", "base", "a/b"))
    made = await opened(server, adapter=(f"formal={FORMAL}",), sgl_endpoint="http://h:1")
    assert made.names == ("theirs", "formal")
    with made.using("theirs") as known:
        assert known == "theirs"
    await made.aclose()
    assert server.loaded.keys() == {"theirs", "base", "a/b"}

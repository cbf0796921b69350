"""Fixtures: the golden folder and the tiny model with the original's weights."""

import argparse
import gc
import logging

import pytest
import torch
from architectures import write_language_model
from confined import confined, time_limit  # noqa: F401  (fixtures)
from data_samples import pairs, shards  # noqa: F401
from golden_data import DEVICE, TINY
from omegaconf import OmegaConf
from programs import Programs

from minigpt4.models import MiniGPT4
from minigpt4.models.language_model import load_language_model

torch.set_num_threads(1)  # the golden numbers were made so, and the tiny matrices gain nothing from more
torch.backends.cudnn.allow_tf32 = False  # of convolutions; PyTorch has it on by default

TINY_CONFIG = {
    "llama_model": str(TINY / "llama"),
    "vit_weights": str(TINY / "eva_vit.safetensors"),
    "q_former_model": str(TINY / "qformer.safetensors"),
    "ckpt": str(TINY / "minigpt4_ckpt.pth"),
    "image_size": 28,
    "num_query_token": 8,
    "vit_precision": "fp32",
    "llm_dtype": "fp32",  # the golden numbers' precision, also where bf16 is the default
    "vit_config": {"patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 4},
    "qformer_config": {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    },
}


def pytest_collection_finish():
    """What has been imported stays: no collection of a test, or of a process forked from it, has to visit it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def root_logger():
    """Takes back what an entry point that a test calls sets up: its handler writes to a stream that is closed later."""
    root = logging.getLogger()
    handlers, level = set(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def golden():
    """The folder of the tiny variant's golden files."""
    return TINY


@pytest.fixture
def tiny_config():
    """The ``model`` section that describes the golden weights."""
    return dict(TINY_CONFIG)


@pytest.fixture(scope="session")
def build():
    """Builds and loads a tiny model on the tests' device, with changes to its section."""

    def from_config(**changes):
        return MiniGPT4.from_config(TINY_CONFIG | changes, device=DEVICE)

    return from_config


@pytest.fixture(scope="session")
def model(build):
    """One loaded tiny model, shared: change it through ``monkeypatch`` only."""
    return build()


@pytest.fixture
def make_runner(tmp_path, tiny_config, monkeypatch):
    """Builds a runner over the recorded batches; its output goes to the test's own folder, without report.png."""

    from recorded_training import RecordedLoader

    from minigpt4.runners import RunnerBase, runner_base
    from minigpt4.tasks import setup_task

    monkeypatch.setattr(runner_base, "write_report", lambda folder: None)  # drawing takes longer than the training

    def make(run, model=None, job_id="job", choices=None, datasets=None):
        cfg = argparse.Namespace(
            run_cfg=OmegaConf.create({**run, "output_dir": str(tmp_path), "device": str(DEVICE)}),
            datasets_cfg=OmegaConf.create({}),
            config=OmegaConf.create({}),
            to_dict=lambda: {"run": dict(run)},
            save=lambda path: path.write_text("run: {}"),
        )
        model = MiniGPT4.from_config({**tiny_config, **(model or {})}, device=DEVICE)
        parts = {"task": setup_task(cfg), "model": model, "datasets": datasets or {}}
        return RunnerBase(cfg=cfg, job_id=job_id, train_loader=RecordedLoader(run, model, choices), **parts)

    return make


@pytest.fixture(scope="session")
def chat():
    """The quickstart's ``Chat`` on the CPU, shared: change it through ``monkeypatch`` only."""
    from serving import build_chat

    return build_chat()


@pytest.fixture(scope="module")
def engine(chat):
    """An engine that answers with the shared chat."""
    from minigpt4.serve.engine import Engine

    engine = Engine(chat, max_batch=4, max_queue=8, max_length=400)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(chat):
    """The API of the shared chat."""
    from serving import Server

    server = Server(chat, max_tokens=100)
    yield server
    server.close()


@pytest.fixture
def engine_requests(server, monkeypatch):
    """What reaches the server's engine."""
    seen, submit = [], server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda *requests: (seen.extend(requests), submit(*requests)))
    return seen


@pytest.fixture(scope="module")
def image(scene_folder):
    """An image as the API receives it."""
    from serving import data_url

    return data_url((scene_folder / "0.png").read_bytes())


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """Five images of scenes, 0.png to 4.png, and a damaged one, 2a.jpg."""
    from random import Random

    from quickstart import scenes

    folder, rng = tmp_path_factory.mktemp("scenes"), Random(1)
    for i in range(5):
        scenes.render(scenes.draw_scene(rng), rng).save(folder / f"{i}.png")
    (folder / "2a.jpg").write_bytes((folder / "2.png").read_bytes()[:100])
    return folder


@pytest.fixture(scope="session")
def programs():
    """Runs Python programs without the seconds of their imports."""
    with Programs() as programs:
        yield programs


@pytest.fixture(scope="session")
def npu_programs(tmp_path_factory):
    """Runs Python programs in which ``import torch`` finds the emulated NPU."""
    from emulated_npu import build

    if build.compiler() is None:
        pytest.skip("the emulated NPU needs a C++ compiler")
    folder = tmp_path_factory.mktemp("npu")
    build.install(folder)
    with Programs(PYTHONPATH=str(folder)) as programs:
        yield programs


@pytest.fixture(scope="session")
def image_kinds(tmp_path_factory):
    """Files of every kind of image that can be read, and of those that cannot."""
    import picture_kinds

    return picture_kinds.write_all(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A random model of an architecture, each built once."""
    models = {}

    def get(name="llama with biases"):
        if name not in models:
            folder = write_language_model(tmp_path_factory.mktemp("llm"), name)
            models[name] = load_language_model(folder, torch.float32, DEVICE)
        return models[name]

    return get


@pytest.fixture
def llm(load):
    return load()

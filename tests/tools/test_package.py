"""What is in the sdist and the wheel, built without compiling; `make test-package` installs them."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import yaml

import hqq_oft

ROOT = Path(__file__).parents[2]


def files_of(*folders):
    """The files of the repository in these folders, without those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {path for path in listed if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, without what was built in it."""
    folder = tmp_path_factory.mktemp("copy")
    for path in files_of():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


def build(kind, source, out):
    """The file that setuptools makes in `out`, as pip and build have it made."""
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    environment = {**os.environ, "HQQ_OFT_BUILD": "0"}
    command = [sys.executable, "-c", program, str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def test_the_sdist_holds_the_sources_of_everything_that_is_installed(sdist, unpacked):
    assert sdist.name == f"hqq_oft-{hqq_oft.__version__}.tar.gz"
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    required = files_of("hqq_oft", "csrc", "kernels/triton", "kernels/configs")
    required |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert required <= names
    assert not [name for name in names if re.match(r"(tests|bench|examples|docs)/", name) or name.endswith(".so")]


def test_the_wheel_of_the_sdist_holds_the_packages_and_nothing_else(unpacked, tmp_path):
    wheel = build("wheel", unpacked, tmp_path)
    assert wheel.name == f"hqq_oft-{hqq_oft.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        described = archive.read(metadata).decode()
    triton = {path.replace("kernels/triton", "hqq_oft/triton_kernels") for path in files_of("kernels/triton")}
    configs = {path.replace("kernels/configs", "hqq_oft/kernel_configs") for path in files_of("kernels/configs")}
    assert "hqq_oft/py.typed" in names
    assert names == files_of("hqq_oft") | triton | configs
    assert f"\nVersion: {hqq_oft.__version__}\n" in described
    assert "\nLicense-Expression: Apache-2.0\n" in described


def test_the_version_is_stated_once():
    stated = [
        path
        for path in files_of("hqq_oft", "pyproject.toml", "setup.py", "CITATION.cff", "docs")
        if path.endswith((".py", ".toml", ".cff")) and hqq_oft.__version__ in (ROOT / path).read_text()
    ]
    assert stated == ["hqq_oft/_installation.py"]


def test_an_old_setuptools_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 77 or later, .* has 65.5.0: run `pip install -U setuptools`"):
        exec((ROOT / "setup.py").read_text(), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})


# --- What GitHub runs ------------------------------------------------------------------------------------------------


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def test_workflows_run_commands_of_the_repository():
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = workflow("tests")["jobs"] | workflow("wheels")["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ["make", "test-package"] in [command[:2] for command in commands]
    assert [".ci/run"] in commands
    assert {command[1] for command in commands if command[0] == "make"} <= targets
    release = workflow("release")["jobs"]
    called = [job["uses"] for job in release.values() if "uses" in job]
    assert all((ROOT / path).is_file() for path in called)
    assert set(release["publish"]["needs"]) == {"tests", "wheels"}
    assert release["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize(
    ("tag", "dated", "passes"),
    [
        (f"v{hqq_oft.__version__}", True, True),
        (f"v{hqq_oft.__version__}", False, False),
        (f"v{hqq_oft.__version__}1", True, False),
    ],
)
def test_a_release_needs_a_tag_that_is_the_version_and_a_dated_changelog(tmp_path, tag, dated, passes):
    (step,) = [step for step in workflow("release")["jobs"]["version"]["steps"] if "run" in step]
    (tmp_path / "hqq_oft").mkdir()
    shutil.copy(ROOT / "hqq_oft" / "_installation.py", tmp_path / "hqq_oft")
    state = "2026-12-01" if dated else "unreleased"
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {hqq_oft.__version__} ({state})\n")
    command = ["bash", "-e", "-c", step["run"]]  # as GitHub runs it
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "TAG": tag})
    assert (done.returncode == 0) == passes


def test_the_citation_and_the_issue_forms_are_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for form in ("bug", "feature"):
        fields = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
        assert {"name", "description", "body"} <= set(fields)
        for field in fields["body"]:
            assert field["type"] in ("markdown", "textarea")
            assert field["attributes"].get("label") or field["attributes"].get("value")
    assert "hqq-oft env" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()


# --- Which installation runs -----------------------------------------------------------------------------------------


def install(site, version):
    """An ordinary installation, whose Python files are those of the repository."""
    shutil.copytree(ROOT / "hqq_oft", site / "hqq_oft", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "hqq_oft-9.dist-info").mkdir()
    (site / "hqq_oft-9.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: hqq-oft\nVersion: {version}\n"
    )
    return site


def test_env_says_that_a_source_folder_runs_and_which_installation_it_hides(source, tmp_path):
    site = install(tmp_path / "site", "9")
    environment = {**os.environ, "PYTHONPATH": str(site), "HQQ_OFT_BACKEND": "auto"}
    command = [sys.executable, "-m", "hqq_oft.env"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    where = f"the source folder {source}, which hides the installation in {site / 'hqq_oft'}: start Python in another"
    assert f"\nrunning from {where} folder to use that\n" in said
    assert f"native on cpu: the native kernels are not built in {where}" in said
    assert "`make native` or `pip install -e .` builds them there" in said
    assert "compiler" not in said


def test_env_names_an_ordinary_installation(tmp_path):
    installed = install(tmp_path / "site", "9") / "hqq_oft"
    running = runpy.run_path(str(installed / "_installation.py"))
    assert running["describe"]() == f"the installation in {installed}"


def test_an_editable_installation_of_the_source_folder_hides_nothing(monkeypatch, tmp_path):
    from hqq_oft import _installation

    class Editable:
        url = ROOT.as_uri()

        def locate_file(self, name):
            return tmp_path / name

        def read_text(self, name):
            return f'{{"url": "{self.url}", "dir_info": {{"editable": true}}}}'

    monkeypatch.setattr(_installation.metadata, "distributions", lambda **kwargs: [Editable()])
    monkeypatch.setattr(_installation, "PACKAGE", ROOT / "hqq_oft")
    assert _installation.describe() == f"the source folder {ROOT}"
    (tmp_path / "other" / "hqq_oft").mkdir(parents=True)
    (tmp_path / "other" / "hqq_oft" / "__init__.py").touch()
    monkeypatch.setattr(Editable, "url", (tmp_path / "other").as_uri())
    assert f"hides the installation in {tmp_path / 'other' / 'hqq_oft'}: start" in _installation.describe()


def test_a_source_folder_without_its_triton_kernels_is_named(monkeypatch):
    from hqq_oft.ops import backends

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.load_backends()["triton"].why_not("linear").startswith("there are no triton kernels in the source")


def test_env_prints_the_build_of_torch(monkeypatch):
    import torch

    from hqq_oft import env

    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert "\ntorch         2.14.1+cu130\n" in env.report()

"""Maps packages from outside the `hqq_oft` folder and builds the native kernels; pyproject.toml holds the rest."""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # the first that reads this pyproject.toml's licence
    sys.exit(
        f"hqq-oft is built with setuptools 77 or later, and this environment has {setuptools.__version__}: run "
        "`pip install -U setuptools` first, or install without --no-build-isolation."
    )

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as native


class BuildNative(build_ext):
    """Compiles the native kernels to `hqq_oft/ops/native/hqq_oft_native.so`, independent of the Python version."""

    def get_ext_filename(self, fullname):
        """File name without the interpreter tag."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext):
        """Build with csrc/build.py."""
        objects = Path(self.build_temp).resolve() / "native"
        native.build(Path(self.get_ext_fullpath(ext.name)).resolve(), PARTS, objects)


PARTS = native.parts()

setup(
    packages=[*find_packages(include=["hqq_oft", "hqq_oft.*"]), "hqq_oft.triton_kernels", "hqq_oft.kernel_configs"],
    # kernels/ has no __init__.py: in a checkout it would shadow the `kernels` package from Hugging Face.
    package_dir={
        "hqq_oft": "hqq_oft",
        "hqq_oft.triton_kernels": "kernels/triton",
        "hqq_oft.kernel_configs": "kernels/configs",
    },
    package_data={"hqq_oft": ["py.typed"], "hqq_oft.kernel_configs": ["*.json"]},
    ext_modules=[Extension("hqq_oft.ops.native.hqq_oft_native", sources=[])] if PARTS else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if PARTS else {},
)

"""Packages outside the `hqq_oft` folder. All else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["hqq_oft", "hqq_oft.triton_kernels", "hqq_oft.kernel_configs"],
    # kernels/ has no __init__.py: it would shadow the `kernels` package from Hugging Face for everyone who runs from a
    # checkout.
    package_dir={
        "hqq_oft": "hqq_oft",
        "hqq_oft.triton_kernels": "kernels/triton",
        "hqq_oft.kernel_configs": "kernels/configs",
    },
    package_data={"hqq_oft": ["py.typed"], "hqq_oft.kernel_configs": ["*.json"]},
)

"""Maps the repository's folders to the package; everything else about the build is in pyproject.toml."""

from setuptools import find_packages, setup

# kernels/ and benchmarks/ stand at the top of the repository but install inside the package:
# distributions called `kernels` and `benchmarks` belong to others.
FOLDERS = {"awnet": "awnet", "awnet.kernels": "kernels", "awnet.benchmarks": "benchmarks"}


def packages() -> list[str]:
    found: list[str] = []
    for package, folder in FOLDERS.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"awnet": ["py.typed", "ops/configs/*.json"]},
)

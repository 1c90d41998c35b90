"""Installation. The version lives in gdp_mmseg/version.py alone."""
from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package, which needs torch."""
    namespace: dict[str, str] = {}
    exec((ROOT / 'gdp_mmseg' / 'version.py').read_text(), namespace)
    return namespace['__version__']


def requirements(name: str) -> list[str]:
    """Read ``requirements/<name>.txt`` without its comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='gdp_mmseg',
    version=version(),
    description='Lossless channel pruning for mmsegmentation via gates (GDP)',
    long_description=(ROOT / 'README.md').read_text(encoding='utf8'),
    long_description_content_type='text/markdown',
    author='gdp_mmseg contributors',
    license='Apache-2.0',
    keywords='semantic segmentation, channel pruning, mmsegmentation',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['gdp_mmseg', 'gdp_mmseg.*']),
    python_requires='>=3.10,<3.13',
    # Neither mm stack is named: they collide and pip cannot tell.
    install_requires=requirements('runtime'),
    extras_require={
        'onedl': requirements('mminstall'),
        'optional': requirements('optional'),
        'tests': requirements('tests'),
    },
    zip_safe=False,
)

"""Installation. The version lives in gdp_mmseg/version.py alone."""
from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Address of the repository, without a slash at the end, e.g.
# 'https://github.com/OWNER/gdp_mmseg'. There is none yet. Links of the README
# are completed by it where a package index shows them.
URL: str | None = None
# What OpenMMLab's `mim` looks for in the folder .mim of an installed package.
FOR_MIM = ('model-index.yml', 'configs/**/*.py', 'configs/**/*.yml',
           'tools/*.py', 'tools/*.sh')
# These write pages of this repository.
NOT_INSTALLED = ('check_models.py', 'models_page.py', 'stock_backbones.py')


def version() -> str:
    """Read the version without importing the package, which needs torch."""
    namespace: dict[str, str] = {}
    exec((ROOT / 'gdp_mmseg' / 'version.py').read_text(), namespace)
    return namespace['__version__']


def requirements(name: str) -> list[str]:
    """Read ``requirements/<name>.txt`` without its comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def long_description() -> str:
    """Read the README, with absolute links if the repository is known."""
    text = (ROOT / 'README.md').read_text(encoding='utf8')
    if not URL:
        return text
    images = URL.replace('://github.com/', '://raw.githubusercontent.com/')
    # Links begin with neither a scheme nor the name of a section.
    text = re.sub(r'(!\[[^]]*\]\()(?!\w+:|#)', rf'\1{images}/main/', text)
    return re.sub(r'((?<!!)\[[^]]*\]\()(?!\w+:|#)', rf'\1{URL}/blob/main/',
                  text)


def files_for_mim() -> list[Path]:
    """List the files that are installed in .mim, relative to this folder."""
    return sorted(
        path.relative_to(ROOT) for pattern in FOR_MIM
        for path in ROOT.glob(pattern) if path.name not in NOT_INSTALLED)


class BuildWithMim(build_py):
    """Build of the package with the folder .mim, which a clone has not.

    An editable installation takes configs and tools from the clone.
    """

    def run(self) -> None:
        """Build the package, then copy what belongs in .mim."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / 'gdp_mmseg' / '.mim'
        # An earlier build may have left files that are gone by now.
        shutil.rmtree(folder, ignore_errors=True)
        for path in files_for_mim():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)


setup(
    name='gdp_mmseg',
    version=version(),
    description='Lossless channel pruning for mmsegmentation via gates (GDP)',
    long_description=long_description(),
    long_description_content_type='text/markdown',
    url=URL,
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
    package_data=dict(gdp_mmseg=['py.typed']),
    cmdclass=dict(build_py=BuildWithMim),
    entry_points=dict(console_scripts=['gdp-mmseg = gdp_mmseg.__main__:main']),
    python_requires='>=3.10,<3.13',
    # Neither mm stack is named: they collide and pip cannot tell.
    install_requires=requirements('runtime'),
    extras_require={
        'onedl': requirements('mminstall'),
        'optional': requirements('optional'),
        'deploy': requirements('deploy'),
        'tests': requirements('tests'),
    },
    zip_safe=False,
)

"""``fastdiff.kernels``: the Triton kernels, one file per operation, from the folder ``kernels``.

Each file holds the kernels of an operation and its launcher, a function with the operation's name
and the arguments of its schema (``fastdiff/ops``). A file is imported at the first launch, since
it imports Triton.

Where fastdiff is installed, the folder is beside this file; in a checkout it is at the repository's
root. It has no ``__init__.py``: with one, Python started in the root would take it for the
package ``kernels`` of another project, which transformers and diffusers look for.
"""

from pathlib import Path

_here = Path(__file__)
_folders = _here.with_suffix(""), _here.parents[1] / "kernels"
__path__ = [str(folder) for folder in _folders if folder.is_dir()][:1]

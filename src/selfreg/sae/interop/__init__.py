"""Everyone's SAEs: other libraries' checkpoints, read by converter functions and never by the model itself.

One module a library; each reads files into the terms that all share (`Foreign`), and refuses by name what it does not
know.
"""

from selfreg.sae.interop.base import Foreign
from selfreg.sae.interop.formats import FORMATS, find_format, read_foreign

__all__ = ["FORMATS", "Foreign", "find_format", "read_foreign"]

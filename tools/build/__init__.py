"""How the extensions are built with ninja: by ``setup.py``, the audit and the emulation."""

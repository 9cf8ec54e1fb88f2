"""How the extensions are built: ``setup.py`` and the tests write files for ninja with this."""

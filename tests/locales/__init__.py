"""The nodes' texts in other languages: ``locales/`` as ComfyUI reads it, from one table and the nodes' own English texts."""

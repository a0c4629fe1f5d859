"""The pictures of the templates and of the documents, painted again by the shipped models: ``python -m comfyui_dmm.tests.pictures``.

Look at each of them before you commit it.
"""

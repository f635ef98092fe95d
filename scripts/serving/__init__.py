"""The server's parts: `patch_batch.py` holds rows and makes patches, `engine.py` decides which rows, `app.py` speaks
HTTP."""

"""What comes from and goes to other machines: models, the example archive, and what a run has made.

Promises: a download that was cut off continues where it stopped, what lies in the folder afterwards has been compared
with what the sender says of it, and nothing is written outside the folder that was named. An upload says what it would
send, and sends no training state and no paths of this machine. May import inputs, checkpoint and what lies below them.
Begin with models.py (`download_model`); archive.py is the example archive, transfer.py one file over HTTP, upload.py
and card.py are the way back.
"""

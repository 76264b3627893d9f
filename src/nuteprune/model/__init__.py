"""What a model is made of: families as data, views of modules, hooks where masks multiply."""

import logging

# Where it is installed, PEFT imports bitsandbytes, which tells of kernels that some CPUs could
# have; and the library that would bring them tells that it is offline.
for name in ("bitsandbytes", "kernels"):
    logging.getLogger(name).setLevel(logging.ERROR)
del name

"""What a model is made of: families as data, views of modules, hooks where masks multiply."""

import logging

# Where it is installed, PEFT imports it, and it tells of kernels that some CPUs could have.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

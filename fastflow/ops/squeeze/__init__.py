from fastflow.ops.squeeze.op import ORDERS, check_even, check_image, squeeze, squeezed_shape, unsqueeze

__all__ = ["ORDERS", "check_even", "check_image", "squeeze", "squeezed_shape", "unsqueeze"]

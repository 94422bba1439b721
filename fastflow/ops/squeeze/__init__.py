from fastflow.ops.squeeze.op import ORDERS, check_even, check_image, squeeze2d, squeezed_shape, unsqueeze2d

__all__ = ["ORDERS", "check_even", "check_image", "squeeze2d", "squeezed_shape", "unsqueeze2d"]

#include "transpose.h"

#include "table.h"

EFFNET_NAMESPACE_BEGIN

template <class T>
void transpose_images(int64_t images, int64_t rows, int64_t columns, const void* from, void* to) {
    transpose_each(images, rows, columns, static_cast<const T*>(from), static_cast<T*>(to));
}

EFFNET_INSTANTIATE(transpose_images)

EFFNET_NAMESPACE_END

#include "look.h"

#include "table.h"
#include "torch_abi.h"

namespace fused_l2 {
namespace {
Offsets offsets{16, 16, 0};

int64_t word(int64_t at) { return *address<const int64_t>(at); }

// A list is {head, size, items*}.
int64_t list_size(int64_t list) { return word(list + offsets.head); }
const int64_t* list_items(int64_t list) { return address<const int64_t>(word(list + offsets.head + 8)); }
// An object is {references, type, ...}; the head's last word is the type.
int64_t type_of(int64_t object) { return word(object + offsets.head - 8); }

void* handle_of(int64_t object) { return address<void>(object + offsets.handle); }
int64_t impl_of(int64_t object) { return word(object + offsets.handle); }
int64_t keys_of(int64_t object) { return word(impl_of(object) + offsets.keys); }

void prefetch(int64_t at) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address<const void>(at));
#else
  (void)at;
#endif
}

// The stride of a dimension of size 1 has no effect.
bool same_strides(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k)
    if (a[k] != b[k] && sizes[k] != 1) return false;
  return true;
}

// Do the elements fill one stretch of memory, in any order of dimensions? Given that they reach over as many elements
// as there are, it is enough that no two dimensions interleave.
bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  for (int64_t k = 0; k < dim; ++k) {
    if (sizes[k] == 1) continue;
    // Each stride is the number of elements of all dimensions with smaller ones.
    int64_t below = 1;
    for (int64_t j = 0; j < dim; ++j)
      if (j != k && sizes[j] != 1 && strides[j] < strides[k]) below *= sizes[j];
    if (strides[k] != below) return false;
  }
  return true;
}

bool has_shape(void* tensor, const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t elements) {
  const TorchAbi& torch = torch_abi();
  int64_t found_dim = 0, *found_sizes = nullptr, *found_strides = nullptr;
  if (torch.get_dim(tensor, &found_dim) != 0 || found_dim != dim || torch.get_sizes(tensor, &found_sizes) != 0 ||
      torch.get_strides(tensor, &found_strides) != 0)
    return false;
  for (int64_t k = 0; k < dim; ++k)
    if (found_sizes[k] != sizes[k]) return false;
  return elements == 0 || same_strides(sizes, found_strides, strides, dim);
}

// Do the elements, one for each group of so many others, lie in a row?
bool has_groups(void* tensor, int64_t elements) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, expected = 1;
  if (torch_abi().get_dim(tensor, &dim) != 0 || torch_abi().get_sizes(tensor, &sizes) != 0 ||
      torch_abi().get_strides(tensor, &strides) != 0)
    return false;
  for (int64_t k = dim - 1; k >= 0; --k) {
    if (sizes[k] != 1 && strides[k] != expected && elements != 0) return false;
    expected *= sizes[k];
  }
  return expected * kGroup == elements;
}

bool is_one_number(void* tensor) {
  int64_t dim = 0, *sizes = nullptr;
  if (torch_abi().get_dim(tensor, &dim) != 0 || torch_abi().get_sizes(tensor, &sizes) != 0) return false;
  for (int64_t k = 0; k < dim; ++k)
    if (sizes[k] != 1) return false;
  return true;
}

// Where the elements of a tensor are. False unless its storage reaches as far as they do.
bool memory_of(void* tensor, int64_t elements, int64_t extent, int64_t element_bytes, int64_t& address,
               int64_t& bytes) {
  const TorchAbi& torch = torch_abi();
  void* data = nullptr;
  int64_t offset = 0;
  if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &bytes) != 0 ||
      torch.get_storage_offset(tensor, &offset) != 0)
    return false;
  address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  return elements == 0 || (data != nullptr && offset * element_bytes + extent * element_bytes <= bytes);
}

// How many elements of memory a tensor reaches over.
int64_t extent_of(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  int64_t last = 0;
  for (int64_t k = 0; k < dim; ++k) {
    if (sizes[k] == 0) return 0;
    last += (sizes[k] - 1) * strides[k];
  }
  return last + 1;
}

// What the i-th watched tensor of a record is.
enum class Shape { full, groups, number };
Shape shape_of(const int64_t* r, int64_t i) {
  if (i < r[record::full]) return Shape::full;
  return i < r[record::full] + r[record::scales] ? Shape::groups : Shape::number;
}
bool has_shape(void* tensor, const int64_t* r, Shape shape) {
  const int64_t dim = r[record::dim], *sizes = r + record::sizes;
  if (shape == Shape::full) return has_shape(tensor, sizes, sizes + dim, dim, r[record::elements]);
  return shape == Shape::groups ? has_groups(tensor, r[record::elements]) : is_one_number(tensor);
}
// How many elements it has, and over how many its memory reaches.
int64_t elements_of(const int64_t* r, Shape shape) {
  if (shape == Shape::full) return r[record::elements];
  return shape == Shape::groups ? r[record::elements] / kGroup : 1;
}
int64_t extent_of(const int64_t* r, Shape shape) {
  const int64_t dim = r[record::dim], *sizes = r + record::sizes;
  return shape == Shape::full ? extent_of(sizes, sizes + dim, dim) : elements_of(r, shape);
}

// Is this tensor what it was? `change` gets the bits of `what` if it is so in another place, which is noted.
bool is_still(int64_t* w, const int64_t* r, Shape shape, int64_t what, int64_t& change) {
  const TorchAbi& torch = torch_abi();
  void* const tensor = handle_of(w[watched::object]);
  int32_t dtype = 0, device = 0;
  if (keys_of(w[watched::object]) != w[watched::keys] || torch.get_dtype(tensor, &dtype) != 0 ||
      dtype != w[watched::dtype] || torch.get_device_index(tensor, &device) != 0 || device != w[watched::device] ||
      !has_shape(tensor, r, shape))
    return false;
  void* data = nullptr;
  int64_t bytes = 0;
  if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &bytes) != 0) return false;
  if (data == address<void>(w[watched::address]) && bytes == w[watched::storage_bytes]) return true;
  if (!memory_of(tensor, elements_of(r, shape), extent_of(r, shape), w[watched::element_bytes], w[watched::address],
                 w[watched::storage_bytes])) {
    w[watched::storage_bytes] = -1;  // not to be taken for what was seen
    return false;
  }
  change |= what;
  return true;
}

// Does the gradient fit the record? Writes its address to the table.
bool takes_gradient(int64_t grad, const int64_t* r) {
  const TorchAbi& torch = torch_abi();
  const int64_t dim = r[record::dim];
  if (type_of(grad) != r[record::grad_type] || keys_of(grad) != r[record::grad_keys]) return false;
  void* const tensor = handle_of(grad);
  int64_t at = 0, bytes = 0;
  int32_t dtype = 0, device = 0;
  if (torch.get_dtype(tensor, &dtype) != 0 || dtype != r[record::grad_dtype] ||
      torch.get_device_index(tensor, &device) != 0 || device != r[record::grad_device] ||
      !has_shape(tensor, r + record::sizes, r + record::sizes + 2 * dim, dim, r[record::elements]) ||
      !memory_of(tensor, r[record::elements], r[record::grad_extent], r[record::grad_element_bytes], at, bytes))
    return false;
  if (r[record::row] != 0) address<int64_t>(r[record::row])[column::grad] = at;
  return true;
}

int64_t* watched_of(int64_t* r) { return r + record::sizes + 3 * r[record::dim]; }

// Addresses that moved, in the parameter's row.
void mend_row(int64_t* r) {
  if (r[record::row] == 0) return;
  int64_t* row = address<int64_t>(r[record::row]);
  const int64_t* w = watched_of(r);
  const int64_t full = r[record::full], states = r[record::states];
  row[column::param] = w[watched::address];
  for (int64_t k = 1; k < full; ++k)
    row[k <= states ? column::state0 + k - 1 : int64_t(column::kept)] = w[k * watched::count + watched::address];
  w += full * watched::count;
  for (int64_t k = 0; k < r[record::scales]; ++k, w += watched::count) row[column::scale0 + k] = w[watched::address];
  // Rows that are not stepped, and those counted on a device, have no counter.
  if (r[record::memory] > 0 && row[column::step] != 0)
    row[column::step] = w[watched::address] | (row[column::step] & 1);
}

int64_t change_of(int64_t grad, int64_t* r) {
  if (!takes_gradient(grad, r)) return change::other;
  const int64_t all = r[record::full] + r[record::scales] + r[record::memory];
  int64_t* w = watched_of(r);
  int64_t found = 0;
  for (int64_t i = 0; i < all; ++i, w += watched::count)
    if (!is_still(w, r, shape_of(r, i), i == 0 ? change::moved : change::state_moved, found)) return change::other;
  if (found != 0) mend_row(r);
  return found | (r[record::active] ? int64_t(0) : change::came);
}
}  // namespace

void set_offsets(const Offsets& found) { offsets = found; }

int64_t make_record(const int64_t* objects, int64_t states, int64_t full, int64_t scales, int64_t memory,
                    int64_t strict, int64_t* out) {
  const TorchAbi& torch = torch_abi();
  void* const param = handle_of(objects[1]);
  void* const grad = handle_of(objects[0]);
  int64_t dim = 0, grad_dim = 0, *sizes = nullptr, *strides = nullptr, *grad_sizes = nullptr, *grad_strides = nullptr;
  int32_t dtype = 0, device = 0;
  if (torch.get_dim(param, &dim) != 0 || torch.get_sizes(param, &sizes) != 0 ||
      torch.get_strides(param, &strides) != 0 || torch.get_dim(grad, &grad_dim) != 0 || grad_dim != dim ||
      torch.get_sizes(grad, &grad_sizes) != 0 || torch.get_strides(grad, &grad_strides) != 0 ||
      torch.get_dtype(grad, &dtype) != 0 || torch.get_device_index(grad, &device) != 0)
    return 0;
  const auto grad_element_bytes = static_cast<int64_t>(torch.dtype_element_size(dtype));
  out[record::active] = 1;
  out[record::row] = 0;
  out[record::grad_type] = type_of(objects[0]);
  out[record::grad_keys] = keys_of(objects[0]);
  out[record::grad_dtype] = dtype;
  out[record::grad_device] = device;
  out[record::grad_element_bytes] = grad_element_bytes;
  out[record::grad_extent] = extent_of(grad_sizes, grad_strides, dim);
  out[record::dim] = dim;
  out[record::states] = states;
  out[record::full] = full;
  out[record::scales] = scales;
  out[record::memory] = memory;
  int64_t elements = 1;
  for (int64_t k = 0; k < dim; ++k) {
    if (grad_sizes[k] != sizes[k]) return 0;
    elements *= sizes[k];
    out[record::sizes + k] = sizes[k];
    out[record::sizes + dim + k] = strides[k];
    out[record::sizes + 2 * dim + k] = grad_strides[k];
  }
  out[record::elements] = elements;
  const int64_t extent = extent_of(sizes, strides, dim);
  if (strict != 0 && (extent != elements || !is_dense(sizes, strides, dim) || out[record::grad_keys] != strict ||
                      (elements != 0 && !same_strides(sizes, grad_strides, strides, dim))))
    return 0;
  int64_t at = 0, bytes = 0;
  if (!memory_of(grad, elements, out[record::grad_extent], grad_element_bytes, at, bytes)) return 0;
  int64_t* w = out + record::sizes + 3 * dim;
  for (int64_t i = 0; i < full + scales + memory; ++i, w += watched::count) {
    const int64_t object = objects[1 + i];
    void* const tensor = handle_of(object);
    w[watched::object] = object;
    w[watched::keys] = keys_of(object);
    if (torch.get_dtype(tensor, &dtype) != 0 || torch.get_device_index(tensor, &device) != 0 ||
        (strict != 0 && w[watched::keys] != strict))
      return 0;
    w[watched::dtype] = dtype;
    w[watched::device] = device;
    w[watched::element_bytes] = static_cast<int64_t>(torch.dtype_element_size(dtype));
    const Shape shape = shape_of(out, i);
    if (strict != 0 && shape == Shape::full && i > 1 && dtype != w[watched::dtype - watched::count]) return 0;
    if (!has_shape(tensor, out, shape) ||
        !memory_of(tensor, elements_of(out, shape), extent_of(out, shape), w[watched::element_bytes],
                   w[watched::address], w[watched::storage_bytes]))
      return 0;
  }
  return w - out;
}

void make_records(const int64_t* objects, int64_t states, int64_t memory, int64_t strict, const int64_t* out,
                  int64_t count, int64_t* lengths) {
  const int64_t full = 1 + states;
  for (int64_t i = 0; i < count; ++i, objects += 1 + full + memory)
    lengths[i] = make_record(objects, states, full, 0, memory, strict, address<int64_t>(out[i]));
}

int64_t look(int64_t params, int64_t grads, const Slots& slots) {
  const int64_t *const expected = slots.expected, *const records = slots.records;
  const int64_t count = slots.count, none = slots.none;
  if (list_size(params) != count || list_size(grads) != count) return -1;
  const int64_t *items = list_items(params), *given = list_items(grads);
  for (int64_t i = 0; i < count; ++i)
    if (items[i] != expected[i]) return -1;
  int64_t found = 0;
  const auto tell = [&](int64_t slot, int64_t what) {
    slots.changed[2 * found] = slot;
    slots.changed[2 * found + 1] = what;
    ++found;
  };
  constexpr int64_t kAhead = 4;
  for (int64_t i = 0; i < count; ++i) {
    // After a forward and backward pass none of this is in the caches: ask for it some slots ahead.
    if (i + 2 * kAhead < count && records[i + 2 * kAhead] != 0) {
      const int64_t at = records[i + 2 * kAhead];
      for (int64_t line = 0; line < 5; ++line) prefetch(at + 64 * line);
      prefetch(given[i + 2 * kAhead] + offsets.handle);
    }
    if (i + kAhead < count && records[i + kAhead] != 0 && *address<int64_t>(records[i + kAhead]) >= 0) {
      int64_t* r = address<int64_t>(records[i + kAhead]);
      const int64_t* w = watched_of(r);
      for (int64_t k = r[record::full] + r[record::scales] + r[record::memory]; k > 0; --k, w += watched::count) {
        const int64_t impl = impl_of(w[watched::object]);
        prefetch(impl);
        prefetch(impl + 64);
        prefetch(impl + 128);
      }
      if (given[i + kAhead] != none) {
        const int64_t impl = impl_of(given[i + kAhead]);
        prefetch(impl);
        prefetch(impl + 64);
        prefetch(impl + 128);
      }
    }
    const int64_t grad = given[i];
    if (records[i] == 0) {
      if (grad != none) tell(i, change::other);
      continue;
    }
    int64_t* r = address<int64_t>(records[i]);
    if (r[record::active] < 0) {
      tell(i, change::other);
    } else if (grad == none) {
      if (r[record::active]) tell(i, change::gone);
    } else if (const int64_t change = change_of(grad, r)) {
      tell(i, change);
    }
  }
  return found;
}

void place(const Slots& slots, const int64_t* which, const int64_t* active, const int64_t* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t* r = address<int64_t>(slots.records[which[i]]);
    if (r[record::active] >= 0) r[record::active] = active[i];
    r[record::row] = rows[i];
    mend_row(r);
  }
}

void exchange(const Slots& slots, const int64_t* which, const int64_t* active, const int64_t* objects, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t* r = address<int64_t>(slots.records[which[i]]);
    r[record::active] = active[i];
    int64_t* w = watched_of(r);
    for (int64_t k = r[record::full] + r[record::scales] + r[record::memory]; k > 1; --k) {
      w += watched::count;
      w[watched::object] = *objects++;
    }
  }
}

bool words_hold(const int64_t* addresses, const int64_t* expected, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (word(addresses[i]) != expected[i]) return false;
  return true;
}
}  // namespace fused_l2

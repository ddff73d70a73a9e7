// What changed between two steps? Asked of every parameter at every step, so it has to be cheap.
//
// A *record* is what was seen of one parameter: int64 words, made once per change. Everything is read through borrowed
// references: a Python tensor object holds the at::Tensor that torch's C ABI calls a handle, so nothing here keeps a
// tensor alive, and Python's collector sees every reference there is. The caller holds the Python objects.
#pragma once
#include <cstdint>

namespace fused_l2 {

namespace record {
// `active`: whether there was a gradient; -1 where some of the tensors may be gone, and nothing is to be read. `row`:
// the parameter's row of a tensor table. The gradient's kind is its Python type, its dispatch keys (which tell sparse,
// negated, fake, ... tensors apart) and its device; `grad_bytes` is how far it reaches in memory. Then: sizes, strides
// of the parameter, strides of the gradient, and per watched tensor the words below.
enum : int {
  active,
  row,
  grad_type,
  grad_keys,
  grad_dtype,
  grad_device,
  grad_element_bytes,
  grad_extent,
  elements,
  dim,
  states,
  full,
  scales,
  memory,
  sizes
};
}  // namespace record
namespace watched {
enum : int { object, keys, address, storage_bytes, dtype, device, element_bytes, count };
}

// Where things are in memory: of a Python object its payload and a tensor's handle; of a tensor its dispatch keys.
struct Offsets {
  int64_t head, handle, keys;
};
void set_offsets(const Offsets& offsets);

// What became of a slot since it was seen, as bits. Where something moved and nothing else changed, record and row have
// been brought up to date.
namespace change {
// `state_moved`: of a state, what is kept or the counter alone; `moved`: of the parameter, too.
enum : int64_t { gone = 1, came = 2, moved = 4, other = 8, state_moved = 16 };
}  // namespace change

// Writes the record of a parameter to `out`; its length, or 0 if there is no telling whether these tensors change.
// objects: the gradient; then `full` tensors of the parameter's shape and strides:
// the parameter, `states` states, what is kept beside it; then `scales` tensors with a byte for each kGroup elements;
// then `memory` step counters. With `strict`, 0 also unless the
// parameter fills its memory and all of the full ones and the gradient lie in memory like it, states of one dtype:
// plain tensors of the dispatch keys `strict`.
int64_t make_record(const int64_t* objects, int64_t states, int64_t full, int64_t scales, int64_t memory,
                    int64_t strict, int64_t* out);

// The strict records of many parameters, each of `states` states and `memory` counters. `objects` has all of theirs,
// one parameter behind the other, `out` where each record goes. `lengths`: what make_record() returns for each.
void make_records(const int64_t* objects, int64_t states, int64_t memory, int64_t strict, const int64_t* out,
                  int64_t count, int64_t* lengths);

// The slots of a plan: which objects its parameters are, the address of each slot's record (0: there is none), how many
// slots there are, the object None, and room for two words per slot.
struct Slots {
  const int64_t* expected;
  const int64_t* records;
  int64_t count;
  int64_t none;
  int64_t* changed;
};

// The rows of these slots are elsewhere (0: there is none), and active or not: writes the addresses of their tensors to
// them.
void place(const Slots& slots, const int64_t* which, const int64_t* active, const int64_t* rows, int64_t count);

// Other state tensors have come in the place of those watched, as many and in the same order. `objects` has those of
// all `count` slots, one slot behind the other; `active`: what each record's first word is to say.
void exchange(const Slots& slots, const int64_t* which, const int64_t* active, const int64_t* objects, int64_t count);

// Compares every slot with its record and writes the gradients' addresses to the tables. Returns the number of slots
// that changed, with (slot, change) for each in `changed`; -1 if the list `params` does not hold the expected objects.
int64_t look(int64_t params, int64_t grads, const Slots& slots);

// Do these words of memory still hold what they held?
bool words_hold(const int64_t* addresses, const int64_t* expected, int64_t count);
}  // namespace fused_l2

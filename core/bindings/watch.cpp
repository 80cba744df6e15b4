// Whether Python objects still are what they were: a check of some thousand facts that is made
// before each decoding step, when the weights have just driven all of them out of the caches.
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/modules.h"

namespace anymamba::bindings {
namespace {

// Facts about dicts, attributes and classes. It keeps what it looks at alive, and compares by identity.
class Watch {
 public:
  // `own` then holds exactly what it holds now.
  void contents(const nb::dict& own) {
    sizes_.emplace_back(own, static_cast<Py_ssize_t>(own.size()));
    fetch_table(own);
    for (const auto [key, value] : own) entries_.push_back({own, nb::borrow(key), nb::borrow(value)});
  }

  // `own` has no `key`, or this very value for it.
  void entry(const nb::dict& own, const nb::object& key) {
    PyObject* const value = PyDict_GetItemWithError(own.ptr(), key.ptr());
    if (value == nullptr && PyErr_Occurred()) throw nb::python_error();
    entries_.push_back({own, key, nb::borrow(value)});
    fetch_table(own);
  }

  // `object` has this very attribute; for functions of a class, whatever its bases are given later.
  void attribute(const nb::object& object, const nb::str& name) {
    attributes_.push_back({object, name, nb::steal(attribute_of(object, name))});
  }

  void type_of(const nb::object& object) {
    types_.emplace_back(object, object.type().ptr());
    fetches(reinterpret_cast<std::uintptr_t>(object.ptr()), kLine / 2);
  }

  // `holds` first fetches this memory into the caches, all of it at once, for what is read one
  // after the other waits for each. A hint alone: nothing is read there, and it may be gone.
  void fetches(std::uintptr_t address, std::size_t bytes) {
    const std::uintptr_t stop = address + bytes;
    for (std::uintptr_t line = address & ~(kLine - 1); line < stop; line += kLine) lines_.push_back(line);
  }

  bool holds() const {
    for (const std::uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    for (const auto& [own, size] : sizes_)
      if (PyDict_Size(own.ptr()) != size) return false;
    for (const Entry& entry : entries_) {
      PyObject* const value = PyDict_GetItemWithError(entry.own.ptr(), entry.key.ptr());
      if (value == nullptr && PyErr_Occurred()) throw nb::python_error();
      if (value != entry.value.ptr()) return false;
    }
    for (const auto& [object, type] : types_)
      if (object.type().ptr() != type) return false;
    for (const Attribute& attribute : attributes_)
      if (nb::steal(attribute_of(attribute.object, attribute.name)).ptr() != attribute.value.ptr()) return false;
    return true;
  }

 private:
  struct Entry {
    nb::dict own;
    nb::object key, value;  // no value: absent
  };

  struct Attribute {
    nb::object object;
    nb::str name;
    nb::object value;
  };

  void fetch_table(const nb::dict& own) {
    fetches(reinterpret_cast<std::uintptr_t>(own.ptr()), kLine / 2);
#if !defined(Py_LIMITED_API)  // which does not tell where the entries are
    if (own.size() == 0) return;
    const auto* table = reinterpret_cast<const PyDictObject*>(own.ptr());
    fetches(reinterpret_cast<std::uintptr_t>(table->ma_keys), 2 * kLine);
    if (table->ma_values != nullptr) fetches(reinterpret_cast<std::uintptr_t>(table->ma_values), kLine);
#endif
  }

  // A new reference; nothing where there is no such attribute.
  static PyObject* attribute_of(const nb::object& object, const nb::str& name) {
    PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (value == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw nb::python_error();
      PyErr_Clear();
    }
    return value;
  }

  static constexpr std::uintptr_t kLine = 64;  // bytes that are fetched together

  std::vector<std::uintptr_t> lines_;
  std::vector<std::pair<nb::dict, Py_ssize_t>> sizes_;
  std::vector<Entry> entries_;
  std::vector<std::pair<nb::object, PyObject*>> types_;
  std::vector<Attribute> attributes_;
};

}  // namespace

void add_watch(nb::module_& m) {
  nb::class_<Watch>(m, "Watch", "Whether dicts, attributes and classes of objects are still what they were.")
      .def(nb::init<>())
      .def("contents", &Watch::contents, nb::arg("own"))
      .def("entry", &Watch::entry, nb::arg("own"), nb::arg("key"))
      .def("attribute", &Watch::attribute, nb::arg("object"), nb::arg("name"))
      .def("type_of", &Watch::type_of, nb::arg("object"))
      .def("fetches", &Watch::fetches, nb::arg("address"), nb::arg("bytes"))
      .def("holds", &Watch::holds);
}

}  // namespace anymamba::bindings

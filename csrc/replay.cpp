// A recorded list of operations, run without Python between them.
// fastdiff/compiler/run/recording.py records it by watching a compiled graph's operations once.
//
// Tensors are in numbered registers: first the inputs of `run`, then the constants, then the
// results of each operation. Operations are called through PyTorch's dispatcher, as Python would
// call them.
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace fastdiff {
namespace {

using c10::IValue;
using Optional = std::optional<at::Tensor>;

// Converts a recorded `value` to an argument of type `type`. Lists are recorded as tuples.
IValue as_type(const IValue& value, const c10::TypePtr& type) {
  if (const auto optional = type->cast<c10::OptionalType>())
    return value.isNone() ? value : as_type(value, optional->getElementType());
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      // A number in a tensor's place is passed as Python's binding passes it: as a wrapped number,
      // which takes part in type promotion by its kind only.
      if (value.isScalar()) {
        auto tensor = c10::scalar_to_tensor(value.toScalar());
        tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
        return tensor;
      }
      break;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      if (value.isInt()) return value;
      break;
    case c10::TypeKind::FloatType:
      if (value.isDouble()) return value;
      if (value.isInt()) return static_cast<double>(value.toInt());
      break;
    case c10::TypeKind::NumberType:
      if (value.isScalar()) return value;
      break;
    case c10::TypeKind::BoolType:
      if (value.isBool()) return value;
      break;
    case c10::TypeKind::StringType:
      if (value.isString()) return value;
      break;
    case c10::TypeKind::DeviceObjType:
      if (value.isString()) return c10::Device(value.toStringRef());
      break;
    case c10::TypeKind::ListType: {
      if (!value.isTuple()) break;
      const auto& element = type->castRaw<c10::ListType>()->getElementType();
      const auto& items = value.toTupleRef().elements();
      if (element->kind() == c10::TypeKind::FloatType) {
        c10::List<double> list;
        for (const auto& item : items) list.push_back(as_type(item, element).toDouble());
        return list;
      }
      if (element->kind() == c10::TypeKind::BoolType) {
        c10::List<bool> list;
        for (const auto& item : items) list.push_back(as_type(item, element).toBool());
        return list;
      }
      if (element->kind() != c10::TypeKind::IntType && element->kind() != c10::TypeKind::SymIntType)
        break;
      c10::List<int64_t> list;
      for (const auto& item : items) list.push_back(as_type(item, element).toInt());
      return list;
    }
    default:
      break;
  }
  TORCH_CHECK_VALUE(false, "cannot record ", value.tagKind(), " as ", type->str());
}

// An argument of a step: a register, a list of registers (where -1 stands for None), or a value.
struct Argument {
  enum class Kind { kRegister, kList, kOptionalList, kValue } kind;
  std::vector<int64_t> registers;
  IValue value;
};

struct Step {
  c10::OperatorHandle operation;
  std::vector<Argument> arguments;
  // Where each result goes: one register, or several for a list.
  std::vector<std::vector<int64_t>> results;
  std::vector<int64_t>
      last;  // registers that no later step reads; they are released after this one
};

class Program : public torch::CustomClassHolder {
 public:
  // `inputs` is the number of tensors that `run` will be given. They are in the first registers.
  explicit Program(int64_t inputs) : inputs_(inputs), registers_(inputs) {
    TORCH_CHECK_VALUE(inputs >= 0, "there cannot be ", inputs, " inputs");
  }

  // Adds a register that always holds `value`, and returns its number.
  int64_t constant(const at::Tensor& value) {
    TORCH_CHECK_VALUE(steps_.empty(), "constants come before the steps");
    constants_.push_back(value);
    return registers_++;
  }

  // Adds one operation as the next step.
  //
  // Each of `arguments`, in the order of the operation's schema, is ("register", i),
  // ("registers", (i, ...)), ("value", v) or ("default",). `results` has a tuple of new registers
  // for each result of the operation. `last` are the registers that neither a later step nor the
  // outputs of `run` need.
  void add(const std::string& name, const std::string& overload, const IValue& arguments,
           const IValue& results, const std::vector<int64_t>& last) {
    const auto operation =
        c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& schema = operation.schema();
    const auto& given = arguments.toTupleRef().elements();
    TORCH_CHECK_VALUE(given.size() == schema.arguments().size(), name, " has ",
                      schema.arguments().size(), " arguments, got ", given.size());
    Step step{operation, {}, {}, last};
    for (size_t i = 0; i < given.size(); ++i)
      step.arguments.push_back(argument(given[i].toTupleRef().elements(), schema.arguments()[i]));
    const auto& written = results.toTupleRef().elements();
    TORCH_CHECK_VALUE(written.size() == schema.returns().size(), name, " has ",
                      schema.returns().size(), " results, got ", written.size());
    int64_t next = registers_;
    for (size_t i = 0; i < written.size(); ++i) {
      const auto kind = schema.returns()[i].type()->kind();
      TORCH_CHECK_VALUE(kind == c10::TypeKind::TensorType || kind == c10::TypeKind::ListType,
                        "cannot record ", name, ": not all of its results are tensors");
      step.results.emplace_back();
      for (const auto& place : written[i].toTupleRef().elements()) {
        TORCH_CHECK_VALUE(place.toInt() == next, "results must be numbered in order");
        step.results.back().push_back(next++);
      }
      TORCH_CHECK_VALUE(kind == c10::TypeKind::ListType || step.results.back().size() == 1,
                        "a tensor goes to one register");
    }
    for (const auto place : last) check_register(place, next);
    registers_ = next;
    steps_.push_back(std::move(step));
  }

  // Sets the registers whose tensors `run` returns.
  void finish(std::vector<int64_t> outputs) {
    for (const auto place : outputs) check_register(place, registers_);
    outputs_ = std::move(outputs);
  }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(inputs.size()) == inputs_, "wanted ", inputs_,
                      " inputs, got ", inputs.size());
    std::vector<IValue> registers(registers_);
    int64_t next = 0;
    for (const auto& input : inputs) registers[next++] = input;
    for (const auto& constant : constants_) registers[next++] = constant;
    torch::jit::Stack stack;
    for (const auto& step : steps_) {
      stack.clear();
      for (const auto& argument : step.arguments) stack.push_back(read(argument, registers));
      step.operation.callBoxed(stack);
      for (size_t i = 0; i < step.results.size(); ++i) keep(stack[i], step.results[i], registers);
      stack.clear();
      for (const auto place : step.last) registers[place] = IValue();
    }
    std::vector<at::Tensor> outputs;
    outputs.reserve(outputs_.size());
    for (const auto place : outputs_) outputs.push_back(registers[place].toTensor());
    return outputs;
  }

 private:
  void check_register(int64_t place, int64_t end) const {
    TORCH_CHECK_VALUE(place >= 0 && place < end, "there is no register ", place);
  }

  Argument argument(c10::ArrayRef<IValue> given, const c10::Argument& wanted) const {
    const auto& kind = given.at(0).toStringRef();
    const auto& type = wanted.type();
    if (kind == "default") {
      TORCH_CHECK_VALUE(wanted.default_value(), wanted.name(), " has no default");
      return {Argument::Kind::kValue, {}, *wanted.default_value()};
    }
    const auto& value = given.at(1);
    if (kind == "value") return {Argument::Kind::kValue, {}, as_type(value, type)};
    if (kind == "register") {
      check_register(value.toInt(), registers_);
      return {Argument::Kind::kRegister, {value.toInt()}, {}};
    }
    TORCH_CHECK_VALUE(kind == "registers" && type->kind() == c10::TypeKind::ListType, wanted.name(),
                      " is no list of tensors");
    const auto element = type->castRaw<c10::ListType>()->getElementType()->kind();
    const bool optional = element == c10::TypeKind::OptionalType;
    Argument list{optional ? Argument::Kind::kOptionalList : Argument::Kind::kList, {}, {}};
    for (const auto& item : value.toTupleRef().elements()) {
      if (!optional || item.toInt() != -1) check_register(item.toInt(), registers_);
      list.registers.push_back(item.toInt());
    }
    return list;
  }

  static IValue read(const Argument& argument, const std::vector<IValue>& registers) {
    switch (argument.kind) {
      case Argument::Kind::kRegister:
        return registers[argument.registers[0]];
      case Argument::Kind::kList: {
        c10::List<at::Tensor> list;
        for (const auto place : argument.registers) list.push_back(registers[place].toTensor());
        return list;
      }
      case Argument::Kind::kOptionalList: {
        c10::List<Optional> list;
        for (const auto place : argument.registers)
          list.push_back(place < 0 ? Optional() : Optional(registers[place].toTensor()));
        return list;
      }
      default:
        return argument.value;
    }
  }

  static void keep(const IValue& value, const std::vector<int64_t>& places,
                   std::vector<IValue>& registers) {
    if (value.isTensor()) {
      registers[places[0]] = value;
      return;
    }
    const auto list = value.toTensorVector();
    TORCH_CHECK(list.size() == places.size(), "an operation gave ", list.size(),
                " tensors where it gave ", places.size(), " when it was recorded");
    for (size_t i = 0; i < list.size(); ++i) registers[places[i]] = list[i];
  }

  int64_t inputs_, registers_;
  std::vector<at::Tensor> constants_;
  std::vector<Step> steps_;
  std::vector<int64_t> outputs_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.class_<Program>("Program")
      .def(torch::init<int64_t>())
      .def("constant", &Program::constant)
      .def("add", &Program::add)
      .def("finish", &Program::finish)
      .def("run", &Program::run);
}

}  // namespace fastdiff

#include "json.h"

#include <algorithm>
#include <cstdlib>

namespace {

constexpr int kDeepest = 200;
constexpr size_t kMostDigits = 4300; // Python's limit of an integer

class Parser {
public:
  explicit Parser(const std::string &text) : text_(text) {}

  Json whole() {
    Json found = value(0);
    space();
    if (at_ != text_.size()) fail();
    return found;
  }

private:
  [[noreturn]] void fail() const { throw Refused("no JSON at byte " + std::to_string(at_)); }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char wanted) {
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void need(char wanted) {
    if (!take(wanted)) fail();
  }

  void space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  bool word(const char *wanted) {
    const std::string expected(wanted);
    if (text_.compare(at_, expected.size(), expected) != 0) return false;
    at_ += expected.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail();
    space();
    Json found;
    switch (peek()) {
    case '{': object(found, depth); break;
    case '[': list(found, depth); break;
    case '"':
      found.kind = Json::Kind::String;
      found.text = string();
      break;
    case 't':
    case 'f':
      if (!word("true") && !word("false")) fail();
      found.kind = Json::Kind::Bool;
      break;
    case 'n':
      if (!word("null")) fail();
      break;
    default: number(found);
    }
    return found;
  }

  void object(Json &found, int depth) {
    found.kind = Json::Kind::Object;
    need('{');
    space();
    if (take('}')) return;
    do {
      space();
      std::string name = string();
      if (found.find(name)) throw Refused("a name stands twice in one object");
      space();
      need(':');
      found.names.push_back(std::move(name));
      found.items.push_back(value(depth + 1));
      space();
    } while (take(','));
    need('}');
  }

  void list(Json &found, int depth) {
    found.kind = Json::Kind::List;
    need('[');
    space();
    if (take(']')) return;
    do {
      found.items.push_back(value(depth + 1));
      space();
    } while (take(','));
    need(']');
  }

  size_t digits() {
    const size_t from = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    if (at_ == from) fail();
    return at_ - from;
  }

  void number(Json &found) {
    const size_t from = at_;
    take('-');
    size_t count = 1;
    if (!take('0')) count = digits();
    bool whole = true;
    if (take('.')) {
      whole = false;
      digits();
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      digits();
    }
    if (whole && count > kMostDigits) fail();
    found.kind = whole && count <= 18 ? Json::Kind::Integer : Json::Kind::Number;
    if (found.is(Json::Kind::Integer))
      found.integer = std::strtoll(text_.substr(from, at_ - from).c_str(), nullptr, 10);
  }

  uint32_t hexadecimal() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      code *= 16;
      if (c >= '0' && c <= '9') code += c - '0';
      else if (c >= 'a' && c <= 'f') code += c - 'a' + 10;
      else if (c >= 'A' && c <= 'F') code += c - 'A' + 10;
      else fail();
      ++at_;
    }
    return code;
  }

  // A character by its number, \uXXXX; two of them for one beyond U+FFFF, never a lone half.
  void escaped(std::string &out) {
    uint32_t code = hexadecimal();
    if (code >= 0xDC00 && code < 0xE000) fail();
    if (code >= 0xD800 && code < 0xDC00) {
      need('\\');
      need('u');
      const uint32_t low = hexadecimal();
      if (low < 0xDC00 || low >= 0xE000) fail();
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    const int lead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(lead[more] | (code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
  }

  // One character of several bytes, copied if it is UTF-8. Source: Unicode 15, table 3-7.
  void multibyte(std::string &out) {
    const auto byte = [&](size_t i) {
      return at_ + i < text_.size() ? static_cast<uint8_t>(text_[at_ + i]) : 0;
    };
    const uint8_t lead = byte(0), second = byte(1);
    const int more = lead >= 0xC2 && lead < 0xE0 ? 1 : lead >= 0xE0 && lead < 0xF0 ? 2
                   : lead >= 0xF0 && lead < 0xF5 ? 3 : 0;
    if (!more) fail();
    for (int i = 1; i <= more; ++i)
      if ((byte(i) & 0xC0) != 0x80) fail();
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
        (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F))
      fail();
    out.append(text_, at_, more + 1);
    at_ += more + 1;
  }

  std::string string() {
    static const std::string kEscapes = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    std::string out;
    need('"');
    while (!take('"')) {
      if (at_ >= text_.size() || static_cast<uint8_t>(peek()) < 0x20) fail();
      if (static_cast<uint8_t>(peek()) >= 0x80) {
        multibyte(out);
      } else if (take('\\')) {
        const size_t known = kEscapes.find(peek());
        if (peek() && known != std::string::npos) {
          out += kMeant[known];
          ++at_;
        } else {
          need('u');
          escaped(out);
        }
      } else {
        out += text_[at_++];
      }
    }
    return out;
  }

  const std::string &text_;
  size_t at_ = 0;
};

} // namespace

const Json *Json::find(const std::string &name) const {
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? nullptr : &items[found - names.begin()];
}

Json parse_json(const std::string &text) { return Parser(text).whole(); }
